"""The running reward-model service: everything that a replica, its start command and its client need."""
