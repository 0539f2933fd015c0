"""What is said about an item beside its reward."""
