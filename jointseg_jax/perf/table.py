"""What can be measured."""

from jointseg_jax.perf import (
    bench_codec,
    bench_input,
    bench_masks,
    bench_sampling,
    bench_startup,
    bench_training,
)

JOBS = {
    "train": bench_training.prepare,
    "sample": bench_sampling.prepare,
    "data": bench_input.prepare,
    "masks": bench_masks.prepare,
    "codec": bench_codec.prepare,
    "startup": bench_startup.prepare,
}
"""Name -> ``(Request) -> Job``."""
