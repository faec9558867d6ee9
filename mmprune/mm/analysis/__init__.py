"""What a config's model costs, what can be cut of it, and what that does: ``tools/analyze.py``."""
