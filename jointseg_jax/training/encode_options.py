"""What to encode of a config's data, and how it is kept.

``dtype`` is that of latents and features:

| dtype | significant bits | largest | for |
|---|---|---|---|
| float16 | 11 | 65504 | the default: three bits more than the bfloat16 that denoisers compute in |
| bfloat16 | 8 | 3e38 | values that leave the range of float16, in as little space |
| float32 | 24 | 3e38 | every bit, in twice the space |

The error of float16 is 2^-12 of the value, far below the least noise of a schedule (0.03), and
latents are of order 1; whatever leaves its range is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jointseg_jax.types import UserError

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What to encode, and how it is kept.

    Attributes:
      out: folder of the cache.
      split: ``train`` or ``val`` of ``config.data``.
      dtype: of latents and features.
      latents: names of the inputs to keep as latents; None decides by line 1 of ``contents.py``.
      keep: further batch fields to keep (``image``, ``labels``).
      crops: random crops of each record; 0 is the centre's.
      limit: so many records only, from the first on.
      batch: rows that a device encodes at a time.
      shard: bytes of a shard, about.
      workers: processes that read; 0 reads in threads of this one.
      threads: that read, in each process.
    """

    out: Path
    split: str = "train"
    dtype: str = "float16"
    latents: tuple[str, ...] | None = None
    keep: tuple[str, ...] = ()
    crops: int = 0
    limit: int | None = None
    batch: int = 32
    shard: int = 256 << 20
    workers: int = 0
    threads: int = 4

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(
                f"ERROR [encode] dtype={self.dtype!r}; one of: {', '.join(DTYPES)}. Set --dtype."
            )
        for name in ("batch", "shard", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"ERROR [encode] {name}={getattr(self, name)}; at least 1.")
        if self.crops < 0 or (self.limit is not None and self.limit < 1):
            raise UserError(
                f"ERROR [encode] crops={self.crops}, limit={self.limit}: crops must be 0 or more "
                "and limit 1 or more."
            )
        if self.workers < 0:
            raise UserError(f"ERROR [encode] workers={self.workers}; at least 0. Set --workers.")
        if self.split == "val" and (self.latents is not None or self.keep):
            raise UserError(
                "ERROR [flags] --split=val: all that its records have is kept, for previews and "
                "evaluation read pixels and labels; leave --latents and --keep out."
            )
