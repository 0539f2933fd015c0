"""Reward functions in the forms that RL frameworks call, on top of the client.

One module per framework; none imports its framework, torch or ray, and everything can be pickled. Each returns the raw
reward of every completion or raises an exception of ``reward_client.errors``: a failure never becomes a number or None.
docs/integrations.md in the service's repository has the configuration of each framework.
"""
