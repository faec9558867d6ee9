"""Analyses of a model before a cut: its costs, prunable groups, floors, locks (:func:`mmprune.analyze`)
and its sensitivity to each group."""
