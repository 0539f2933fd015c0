"""The audit of a reward model: is it a preference model, or a length detector in its costume?

Measures are pure functions of scored pairs, one module each; ``findings`` puts them together and ``verdicts`` says them
in plain words. ``scoring`` gets the rewards, ``charts`` and ``report`` show what was found, ``command`` runs all this.
"""
