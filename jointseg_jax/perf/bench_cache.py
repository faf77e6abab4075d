"""How many samples per second a source's batches come at.

  python -m jointseg_jax.perf.bench_cache CACHE             an encoded data set
  python -m jointseg_jax.perf.bench_cache --records 20000   made-up records, 35 kB each (64 x 64 x 4
                                                    latents, 77 ids), in a temporary folder
  python -m jointseg_jax.perf.bench_cache --records 5000 --features   with 77 x 768 features

It is the iteration that training does, with nothing done to the batches. Prints one JSON object:
median, slowest and fastest of ``--repeats`` stretches of ``--seconds``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.cached import shard_writer
from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.cached.store import Field, row_bytes, shard_name
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import to_content
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import Source
from jointseg_jax.perf import harness

PER_SHARD = 4096


def reading_rate(
    made: Iterator[dict[str, np.ndarray]], *, seconds: float, repeats: int = 5
) -> dict[str, int]:
    """Samples per second of batches: median, slowest and fastest of ``repeats`` stretches."""
    rates = []
    for _ in range(repeats + 1):  # the first finds batches ready, and threads that start
        start, samples = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            samples += len(next(made)["index"])
        rates.append(samples / (time.perf_counter() - start))
    found = {"samples_per_second": statistics.median, "slowest": min, "fastest": max}
    return {name: round(of(rates[1:])) for name, of in found.items()}


def measure(
    source: Source, *, batch: int, seconds: float, repeats: int = 5, threads: int = 2
) -> dict[str, int]:
    """The rate of a source's shuffled training batches."""
    # No transforms: reading alone.
    with batches(source, ReadConfig(threads=threads), batch=batch, seed=0, transforms=()) as made:
        found = reading_rate(made, seconds=seconds, repeats=repeats)
    return found | {"records": len(source), "batch": batch, "threads": threads}


def made_up(root: Path, records: int, *, features: bool) -> Cache:
    """Writes a cache of random latents and token ids, or text features."""
    latents = Field(name="latents/image", dtype="float16", shape=(64, 64, 4))
    ids = Field(name="text", dtype="int32", shape=(77,))
    text = Field(name="text", dtype="float16", shape=(77, 768)) if features else ids
    shards = -(-records // PER_SHARD)
    head = {"settings": {"source": {"name": "made up"}}, "words": [], "text": text.plain()}
    head |= {"classes": to_content(Classes(names=("a",))), "fields": [latents.plain()]}
    head |= {"crops": 1, "flip": None, "variants": 1, "records": records}
    shard_writer.begin(root, "train", head)
    rng = np.random.default_rng(0)

    def draw(field: Field) -> np.ndarray:
        return rng.integers(0, 1000, (1, *field.shape)).astype(field.dtype)

    for number in range(shards):
        own = range(number * PER_SHARD, min((number + 1) * PER_SHARD, records))
        name, part = shard_name("train", number, shards), text if features else None
        shard = shard_writer.ShardWriter(root, name, [latents], len(own), part)
        for index in own:
            note = {"id": str(index), "captions": [str(index)]}
            shard.add({latents.name: draw(latents)}, [note], draw(text) if features else None)
        shard.close()
    shard_writer.finish(root, "train", shards, None if features else lambda _: draw(text)[0])
    return Cache(root=str(root), split="train")


def main() -> None:
    """Measures what the command line names."""
    parser = harness.parser(__doc__)
    parser.add_argument("cache", nargs="?", help="folder of a cache")
    parser.add_argument("--split", default="train")
    parser.add_argument("--records", type=int, default=20_000, help="made-up records")
    parser.add_argument("--features", action="store_true", help="with text features (185 kB)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    options = {k: getattr(flags, k) for k in ("batch", "threads", "seconds", "repeats")}
    with tempfile.TemporaryDirectory() as folder:
        if flags.cache:
            source = Cache(root=flags.cache, split=flags.split)
        else:
            source = made_up(Path(folder), flags.records, features=flags.features)
        row = row_bytes([*source.fields, *([source.texts.field] if source.texts else [])])
        print(json.dumps(measure(source, **options) | {"row_bytes": row}))


if __name__ == "__main__":
    main()
