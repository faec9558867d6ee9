"""mmpose's modules that keep widths as numbers."""
