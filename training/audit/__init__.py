"""The audit of a reward model: it reports whether the model measures preference or mostly length.

Measures are pure functions of scored pairs, one module each; ``findings`` collects them and ``conclusions`` answers
questions from them in words. ``scoring`` computes the rewards, ``charts`` and ``report`` present the findings, and
``command`` is the command line.
"""
