"""What can go, how far, and what hurts, before anything is cut: :func:`mmprune.analyze`."""
