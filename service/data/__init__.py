"""Data files and what their rows mean."""
