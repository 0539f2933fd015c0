"""Watches the stream of scored items for what a policy does to fool the reward model."""
