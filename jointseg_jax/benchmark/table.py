"""What can be measured."""

from jointseg_jax.benchmark import cleanup, codec, input, sampling, startup, training

JOBS = {
    "train": training.prepare,
    "sample": sampling.prepare,
    "data": input.prepare,
    "masks": cleanup.prepare,
    "codec": codec.prepare,
    "startup": startup.prepare,
}
"""Name -> ``(Request) -> Job``."""
