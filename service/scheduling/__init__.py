"""Which waiting sequences share the next forward pass, and what they have in common."""
