"""What makes a reward model out of preference pairs."""
