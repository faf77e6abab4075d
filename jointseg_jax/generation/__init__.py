"""From a trained workdir to files: the sampling loop and its writer."""
