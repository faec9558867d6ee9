"""Before a cut: what a model costs, what may be cut, how far, and what it needs
(:func:`mmprune.analyze`)."""
