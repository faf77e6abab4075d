"""Maps between pixels and latents, for images and for annotations."""
