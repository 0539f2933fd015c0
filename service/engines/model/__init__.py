"""The loaded classifier and what is read off it."""
