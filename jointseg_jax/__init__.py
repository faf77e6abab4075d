"""Images and pixel-level annotations, generated together, in JAX."""

__version__ = "0.1.0"
