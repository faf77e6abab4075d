"""Streaming metrics of annotations and of generated pairs."""
