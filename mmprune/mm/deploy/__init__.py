"""Export to ONNX, and what runs, checks, quantises and evaluates the exported file."""
