"""A data set encoded once: its files, and what reads and writes them."""
