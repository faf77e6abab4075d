"""Attention of all tokens to all tokens, by the backend that the device is best at.

``y = softmax(q k^T / sqrt(d)) v`` over the keys ``0 .. count - 1``; the others are padding.

| name | runs on | q, k, v, y | the scores ``[b, h, n, n]`` |
|---|---|---|---|
| xla | all | ``[b, n, h, d]`` | in memory |
| cudnn | NVIDIA GPUs, 16-bit | ``[b, n, h, d]`` | in blocks that never leave the chip |
| packed | TPUs, our kernel (``packed_attention``) | ``[b, n, h * d]`` | in blocks |
| splash | TPUs, JAX's kernel, for what packed does not take | ``[b, h, n, d]`` | in blocks |

Each kernel has the layout that it reads without a copy. A common one would also cost memory: in a
scan, y would be stored twice for the backward pass, as the kernel wrote it and as it is read.

Source: FlashAttention (Dao et al. 2022).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jointseg_jax import chips
from jointseg_jax.sharding import on_shards

ATTENTION = ("auto", "xla", "packed", "splash", "cudnn")
"""The names of backends; ``auto`` is one of the others, by the device and the sizes."""

SHORT = 256  # up to this many tokens plain products are as good: the scores are small
LANES = 128  # numbers that a TPU works on at once; arrays' last axes are stored in multiples of it
WASTE = 0.05  # part of the tokens that may be padding in every layer; beyond it only kernels pad

SPLASH_SCORES: dict[str | None, tuple[int, int]] = {
    "v5e": (2304, 1152 * 1152),
    "v5p": (2304, 1152 * 1152),
    "v6e": (2304, 1152 * 1152),
    None: (1024, 512 * 512),
}
"""TPU generation -> most keys in a block, and most scores (float32, several of them in VMEM)."""

HeadsFirst = Float[Array, "batch heads tokens size"]


def chosen(name: str, *, dtype: DTypeLike, heads: int, size: int, tokens: int) -> str:
    """Returns the backend that ``auto`` stands for where the program runs; others are themselves.

    Args:
      size: of one head.
    """
    if name != "auto":
        return name
    target, half = chips.target(), jnp.dtype(dtype).itemsize == 2
    if target.platform == "tpu" and half and tokens > SHORT:
        # imported here: only TPU programs pay for Pallas
        from jointseg_jax.models.packed_attention import fits

        if fits(heads, size, tokens):
            return "packed"
        if size % 64 == 0:
            return "splash"
    # JAX calls AMD's GPUs "gpu" too; cuDNN is NVIDIA's
    nvidia = target.platform == "gpu" and "nvidia" in target.kind.lower()
    if nvidia and half and size % 8 == 0 and size <= 128:
        return "cudnn"
    return "xla"


def room(backend: str, tokens: int) -> int:
    """Returns how many tokens every layer should have, so that no layer pads them again."""
    if backend == "packed":
        from jointseg_jax.models import packed_attention

        return packed_attention.room(tokens)
    return splash_room(tokens) if backend == "splash" else tokens


def splash_room(tokens: int) -> int:
    """Returns a multiple of 128 where that costs little, else ``tokens``."""
    lanes = -(-tokens // LANES) * LANES
    return lanes if lanes <= (1 + WASTE) * tokens else tokens


def padding(name: str, *counts: int, dtype: DTypeLike, heads: int, size: int) -> int:
    """Returns how many tokens to append once, so that no layer has to pad.

    One number for all ``counts``; 0 where none suits all of them, and layers pad for themselves.
    """
    backends = [chosen(name, dtype=dtype, heads=heads, size=size, tokens=n) for n in counts]
    rooms = [room(b, n) for b, n in zip(backends, counts, strict=True)]
    if len(counts) == 1:
        return rooms[0] - counts[0]
    pads = sorted({n - count for n, count in zip(rooms, counts, strict=True)})
    # n + p must be a length that its kernel takes as it is: its own room
    suits = (p for p in pads if all(room(b, n + p) == n + p for b, n in zip(backends, counts)))
    return next(suits, 0)


attend_xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
"""Attention ``(q, k, v) -> y`` by plain matrix products, softmax in float32."""

attend_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
"""Fused attention of cuDNN; bfloat16 or float16 on an NVIDIA GPU."""


def attend_splash(
    q: HeadsFirst, k: HeadsFirst, v: HeadsFirst, count: int | None = None
) -> HeadsFirst:
    """``softmax(q k^T) v``, its forward pass named ``attn_out`` for remat; interpreted on a CPU.

    Args:
      q: scaled already.
      count: of the tokens that are none of padding; None: all.

    Raises:
      ValueError: on a GPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    target = chips.target()
    if target.platform == "gpu":
        raise ValueError("attention: splash runs on TPUs (and is interpreted on CPUs); use auto.")
    tokens = q.shape[2]
    more = -tokens % LANES
    if more:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
    queries, keys = splash_blocks(tokens + more, target.generation)
    # Tokens along the lanes: a head of 64 would fill half of them.
    by_token = kernels.QKVLayout.SEQ_MINOR
    run = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([_splash_mask(tokens + more, count or tokens)] * q.shape[1]),
        block_sizes=kernels.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), queries),
            **dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dkv"), keys),
            **dict.fromkeys(("block_kv_dkv_compute", "block_kv_dq"), keys),
            **dict.fromkeys(("q_layout", "k_layout", "v_layout"), by_token),
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attn_out",
        interpret=target.platform == "cpu",
    )
    # GSPMD cannot split a kernel: each device of the data axes runs it on its own rows
    return on_shards(jax.vmap(run), ("batch", q.shape[0]))(q, k, v)[:, :, :tokens]


def splash_blocks(tokens: int, generation: str | None) -> tuple[int, int]:
    """Returns queries and keys in a block for a length that is a multiple of 128.

    All keys at once where they fit, and as many queries as the limit of scores leaves.
    """
    keys_limit, limit = SPLASH_SCORES.get(generation, SPLASH_SCORES[None])
    sizes = [n for n in range(LANES, tokens + 1, LANES) if tokens % n == 0]
    keys = max(n for n in sizes if n <= max(keys_limit, LANES))
    queries = max(n for n in sizes if n * keys <= max(limit, LANES * keys))
    return queries, keys


@functools.cache  # one mask for each size: equal masks must be the same object
def _splash_mask(tokens: int, count: int) -> Any:
    """The keys before ``count``; computed in the kernel, not stored."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if count == tokens:
        return masks.FullMask((tokens, tokens))

    class KeysBeforeCount(masks._ComputableMask):
        def __eq__(self, other: object) -> bool:
            return self is other

        def __hash__(self) -> int:
            return hash((tokens, count))

    return KeysBeforeCount((tokens, tokens), lambda query, key: key < count)
