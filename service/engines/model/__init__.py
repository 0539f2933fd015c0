"""The loaded classifier, its head, and the hidden states that are read from it."""
