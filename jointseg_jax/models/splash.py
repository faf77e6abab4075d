"""Splash attention: JAX's Pallas kernel for TPUs, its blocks, its padding and its place on a mesh.

1. It takes lengths that are multiples of 128. ``room`` says how many tokens to make of N, so that
   they are padded once and not in every layer; what comes unpadded is padded here.
2. Queries, keys and values lie with the tokens along the lanes, of which a head size of 64 would
   fill half.
3. Blocks: all keys at once, where they fit, and as many queries as leave the scores of a block
   below ``SCORES`` numbers.
4. A mesh splits rows over its data axes; each device runs the kernel on its own rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from jointseg_jax import chips
from jointseg_jax.sharding import on_shards

LANES = 128
WASTE = 0.05
"""Part of the tokens that may be padding in every layer; beyond it only the kernel pads."""

SCORES: dict[str | None, tuple[int, int]] = {
    "v5e": (2304, 1152 * 1152),
    "v5p": (2304, 1152 * 1152),
    "v6e": (2304, 1152 * 1152),
    None: (1024, 512 * 512),
}
"""TPU generation -> most keys in a block, and most scores (float32, several of them in VMEM)."""

Heads = Float[Array, "batch heads tokens size"]


def room(tokens: int) -> int:
    """How many tokens every layer should have: a multiple of 128 where that costs little."""
    lanes = -(-tokens // LANES) * LANES
    return lanes if lanes <= (1 + WASTE) * tokens else tokens


def attend_splash(q: Heads, k: Heads, v: Heads, count: int | None = None) -> Heads:
    """``softmax(q k^T) v``, its forward pass named ``attn_out`` for remat; interpreted on a CPU.

    Args:
      q: scaled already.
      count: of the tokens that are none of padding; None: all.
    """
    tokens = q.shape[2]
    more = -tokens % LANES
    if more:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q, k, v))
    target = chips.target()
    if target.platform == "gpu":
        raise ValueError("attention: splash runs on TPUs (and is interpreted on CPUs); use auto.")
    length, real = tokens + more, count or tokens
    mask = masks.FullMask((length, length)) if real == length else _Real(length, real)
    run = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=blocks(length, target.generation),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attn_out",
        interpret=target.platform == "cpu",
    )
    return on_shards(jax.vmap(run), ("batch", q.shape[0]))(q, k, v)[:, :, :tokens]


def blocks(tokens: int, generation: str | None) -> kernels.BlockSizes:
    """Block sizes for a length that is a multiple of 128, the same forward and backward."""
    keys_limit, limit = SCORES.get(generation, SCORES[None])
    sizes = [n for n in range(LANES, tokens + 1, LANES) if tokens % n == 0]
    keys = max(n for n in sizes if n <= max(keys_limit, LANES))
    queries = max(n for n in sizes if n * keys <= max(limit, LANES * keys))
    by_token = kernels.QKVLayout.SEQ_MINOR
    return kernels.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
        q_layout=by_token,
        k_layout=by_token,
        v_layout=by_token,
    )


class _Real(masks._ComputableMask):
    """The keys that are none of padding; computed in the kernel, not stored."""

    def __init__(self, tokens: int, count: int):
        self.count = count
        super().__init__((tokens, tokens), lambda query, key: key < count)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Real) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return hash((self.shape, self.count))
