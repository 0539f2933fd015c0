"""Data files: reading rows, parsing them into prompts and completions, and the hold-out rule."""
