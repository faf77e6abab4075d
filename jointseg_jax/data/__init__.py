"""Records, sources, transforms and the input pipeline (NumPy and Grain only)."""
