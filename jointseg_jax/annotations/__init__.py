"""Label maps on the host: clean-up, instances, pictures."""
