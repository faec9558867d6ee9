"""Analyses the model of a config before any training: its costs, locks, floors and sensitivities."""
