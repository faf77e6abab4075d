"""Compositions of streams, codecs, processes and a denoiser: a loss and a generator."""
