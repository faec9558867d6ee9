"""Exports models to ONNX, and runs, checks, quantises and evaluates the exported files."""
