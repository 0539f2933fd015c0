"""A sandbox for the chat templates of checkpoints, in which a rendering has bounded work."""
