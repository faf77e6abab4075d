"""Encodes the data of a config once, so that training reads latents instead of making them.

  python launch/train.py --config configs/jodiffusion_codec.py:data=folders --workdir runs/codec
  python launch/encode.py --config configs/jodiffusion.py:data=folders --out caches/folders
  python launch/train.py --config configs/jodiffusion.py:data=folders --workdir runs/jodiffusion \\
      --config.data.cache=caches/folders

Give the same config, with the same --config.* overrides, to encode and to train. --split=train
reads config.data.train as training would; inputs whose codec has parameters become latents, the
others (pixels, analog bits, colours) are kept as they are. Texts (token ids, features) are kept
once, however many records have the same.

--split=val into the same folder keeps the pixels, labels and texts of config.data.val as previews
and evaluation read them: then a run needs the cache alone. Without it they go on reading
config.data.val, and so they do where config.evaluate.transforms give evaluation its own size.
Sampling uses the codec itself, which OUT/frozen holds.

What differs from training without a cache:
  crops    random crops become the centre's; --crops=4 keeps four random ones of each record
  flips    if config.data.transforms flips, each record is kept plain and mirrored
  order    records come in another order, and other flips and captions are drawn
  rounding latents and features are float16 (11 bits; denoisers compute in bfloat16, 8 bits);
           --dtype=float32 keeps every bit in twice the space, --dtype=bfloat16 the range in 8 bits

Killed or stopped (SIGTERM: exit status 75), the same command goes on: whole shards are kept,
checked by SHA-256, and the bytes come out the same. Run on a finished cache it checks all of it,
and writes damaged shards again. A folder made with other settings is refused, with each setting
that differs. Several processes (the flags and environment of launch/train.py) share the shards and
write the same bytes as one; --out is a folder they all see.

Pictures are read by --threads of this process; --workers=N reads in N processes, each with that
many threads, which pays where reading is Python rather than decoding.

Writes OUT/SPLIT-*.bin and .json (shards), OUT/SPLIT.json (index), OUT/SPLIT.text.bin and two .npy
(texts), OUT/frozen/. How fast a cache can be read:
  python launch/benchmark.py --what data --config C --config.data.cache=caches/folders
  python -m jointseg_jax.perf.bench_cache caches/folders --batch 256
The last line of output is one JSON object. Exit status 2: a mistake, reported in one block.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from jointseg_jax import cli, distributed
from jointseg_jax.config import RunConfig

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the run that will train, as for launch/train.py."
)
OUT = flags.DEFINE_string("out", None, "Folder of the cache; the same folder goes on.")
SPLIT = flags.DEFINE_enum("split", "train", ("train", "val"), "Split of config.data to encode.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float16", ("float16", "bfloat16", "float32"), "Of latents and features."
)
LATENTS = flags.DEFINE_list(
    "latents",
    None,
    "Inputs to keep as latents, such as image,mask; by default those whose codec has parameters.",
)
KEEP = flags.DEFINE_list("keep", [], "Further batch fields to keep: image, labels.")
CROPS = flags.DEFINE_integer("crops", 0, "Random crops of each record; 0: the centre's.")
LIMIT = flags.DEFINE_integer(
    "limit", None, "At most this many records, from the first.", lower_bound=1
)
BATCH = flags.DEFINE_integer("batch", 32, "Rows a device encodes at a time.", lower_bound=1)
SHARD = flags.DEFINE_integer("shard_mb", 256, "Size of a shard, about.", lower_bound=1)
WORKERS = flags.DEFINE_integer("workers", 0, "Processes that read; 0: threads only.", lower_bound=0)
THREADS = flags.DEFINE_integer("threads", 4, "Threads that read, in each process.", lower_bound=1)
cli.define_process_flags()

EVERY = 30.0
"""Seconds from line to line, where progress goes to a log."""
LINE = "{desc}: {n_fmt} of {total_fmt} records, {rate_fmt}, {remaining} left\n"
flags.mark_flags_as_required(["config", "out"])


def main() -> None:
    """Encodes one split."""
    cli.start()
    from jointseg_jax.training.encode import encode
    from jointseg_jax.training.encode_plan import EncodeOptions
    from jointseg_jax.training.preemption import ExitOnSigterm

    options = EncodeOptions(
        out=Path(OUT.value),
        split=SPLIT.value,
        dtype=DTYPE.value,
        latents=None if LATENTS.value is None else tuple(LATENTS.value),
        keep=tuple(KEEP.value),
        crops=CROPS.value,
        limit=LIMIT.value,
        batch=BATCH.value,
        shard=SHARD.value << 20,
        workers=WORKERS.value,
        threads=THREADS.value,
    )
    with ExitOnSigterm():
        report = encode(RunConfig.parse(CONFIG.value.to_dict()), options, progress=_bar, show=_say)
    if distributed.is_first():
        print(f"to train from it: launch/train.py ... --config.data.cache={OUT.value}")
    cli.last_line(report)


def _bar(total: int, desc: str) -> tqdm:
    """Progress of this process, with the time that is left: a bar, or lines in a log."""
    on_screen = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=desc,
        unit=" records",
        delay=2.0,  # nothing is drawn for what takes less
        disable=not distributed.is_first() or not total,
        dynamic_ncols=on_screen,
        mininterval=0.1 if on_screen else EVERY,
        bar_format=None if on_screen else LINE,
    )


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    cli.run(main)
