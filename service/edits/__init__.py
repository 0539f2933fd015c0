"""Edits of a completion as a policy makes them when it exploits a reward model, and what a reward pays for them.

``edits``, ``facts`` and ``formats`` change texts, ``phrases`` has the sentences that they add, ``probe`` measures how
the reward moves. Everything is pure and seeded; rewards come from the caller.
"""
