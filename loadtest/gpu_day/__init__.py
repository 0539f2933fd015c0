"""All measurements and tests of a GPU in one command, for a machine that is at hand for half an hour.

Each section runs in a process of its own with a time limit; after each one the report is written.
"""
