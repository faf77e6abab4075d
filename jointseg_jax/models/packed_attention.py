"""Packed attention: our own Pallas kernel for TPUs, for heads smaller than the lanes of a chip.

A TPU works on 128 lanes, a head often has 64 numbers. Kernels that take heads one by one make XLA
move heads before tokens and store each of them padded to 128 lanes. This one reads queries, keys
and values where the projections left them, ``[batch, tokens, width]``: heads lie side by side along
the lanes, ``pack = 128 / d`` of them in each group of 128, and a product with one of them is the
product with the group in which the others are set to 0. It costs the matrix unit nothing, which is
as wide as the lanes.

Forward, for a group and a block of queries with all keys at once, ``lse = m + log l`` is kept for
the backward pass. That is one pass of five products, where two passes that share nothing take
seven. Scores, sums and gradients are float32; what goes into a product has the dtype of the
queries.

Source: FlashAttention (Dao et al. 2022), without its walk over blocks of keys.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jointseg_jax import chips
from jointseg_jax.models.attention import LANES, WASTE
from jointseg_jax.sharding import on_shards

ROWS = 16  # of bfloat16 in a register: numbers of tokens are multiples of it
QUERIES = 768  # most in a block
SCORES = 2176 * 768  # most in a block; VMEM holds several such arrays of float32
LONGEST = SCORES // LANES  # most tokens that the kernel takes
VMEM = 60 * 2**20  # of the 64 MiB (v5p) or 128 MiB (v5e, v6e) that a core has
PACKED = (16, 32, 64, 128)  # head sizes that fill the lanes evenly
PARALLEL = ("parallel", "parallel", "arbitrary")

Tokens = Float[Array, "batch tokens width"]

Kept = tuple[Array, Array, Array, Array, Array]
"""q, k, v, y ``[b, n, h * d]`` and lse: what the backward pass reads."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How heads and tokens lie in a call of the kernel."""

    size: int  # of a head
    count: int  # of the tokens that are none of padding
    queries: int  # in a block; they divide the tokens


def fits(heads: int, size: int, tokens: int) -> bool:
    """Returns True if the kernel takes this many heads of this size over this many tokens."""
    return size in PACKED and heads * size % LANES == 0 and tokens <= LONGEST


def block(tokens: int) -> int | None:
    """Returns the queries in a block: the divisor of ``tokens`` that costs least, or None."""
    limit = min(QUERIES, SCORES // tokens)
    sizes = [n for n in range(ROWS, min(limit, tokens) + 1, ROWS) if tokens % n == 0]
    return min(sizes, key=lambda n: (_cost(tokens, n), -n), default=None)


def room(tokens: int) -> int:
    """Returns how many tokens every layer should have: more, where they make better blocks."""
    first = -(-tokens // ROWS) * ROWS
    last = max(first, int((1 + WASTE) * tokens))
    # a prime number of tokens has no good divisor, its neighbours do; later layers cost ~ length
    blocks = {n: block(n) for n in range(first, last + 1, ROWS)}
    costs = {n: _cost(n, queries) * n for n, queries in blocks.items() if queries}
    return min(costs, key=lambda n: costs[n])


def _cost(tokens: int, queries: int) -> int:
    """Returns registers that the scores of eight keys take, plus what beginning a block costs."""
    # One more for each block: the compiler's schedules of the backward pass over 2176 tokens have
    # 76 cycles a query in blocks of 128 and 49, 40, 38 in blocks of 544, 720, 1088.
    return tokens // queries * (-(-queries // LANES) + 1)


def attend_packed(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    *,
    heads: int,
    count: int | None = None,
    queries: int | None = None,
) -> Tokens:
    """``softmax(q k^T) v`` of each head, its result named ``attn_out`` for remat.

    Interpreted on a CPU.

    Args:
      q: scaled already; the heads of one token side by side.
      count: of the tokens that are none of padding; None: all.
      queries: in a block, a divisor of ``room(tokens)``; None: ``block`` says.

    Raises:
      ValueError: heads, lengths or blocks that the kernel does not take, or a GPU.
    """
    tokens, size = q.shape[1], q.shape[2] // heads
    if chips.target().platform == "gpu":
        raise ValueError("attention: packed runs on TPUs (and is interpreted on CPUs); use auto.")
    if not fits(heads, size, tokens):
        raise ValueError(
            f"attention: packed takes heads of {', '.join(map(str, PACKED))} that fill groups of "
            f"{LANES} and at most {LONGEST} tokens; there are {heads} of {size} and {tokens} "
            "tokens. Use auto."
        )
    length = room(tokens)
    queries = queries or block(length)
    if not queries or length % queries or queries % ROWS:
        raise ValueError(
            f"attention: packed, queries = {queries}: give a multiple of {ROWS} that divides the "
            f"{length} tokens."
        )
    if length > tokens:
        pad = ((0, 0), (0, length - tokens), (0, 0))
        q, k, v = (jnp.pad(x, pad) for x in (q, k, v))
    run = functools.partial(_attend, Layout(size, count or tokens, queries))
    rows, _, width = q.shape
    run = on_shards(run, ("batch", rows), None, ("heads", width // LANES))
    return run(q, k, v)[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(layout: Layout, q: Array, k: Array, v: Array) -> Array:
    return _forward(layout, q, k, v, keep=False)[0]


def _attend_forward(layout: Layout, q: Array, k: Array, v: Array) -> tuple[Array, Kept]:
    # Both are named: a policy that keeps y alone would run the kernel again for lse.
    y, lse = (checkpoint_name(x, "attn_out") for x in _forward(layout, q, k, v, keep=True))
    return y, (q, k, v, y, lse)


def _attend_backward(layout: Layout, kept: Kept, dy: Array) -> tuple[Array, ...]:
    return _backward(layout, *kept, dy)


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(layout: Layout, q: Array, k: Array, v: Array, *, keep: bool) -> tuple[Array, ...]:
    """``(y,)``, and ``lse [batch, groups, blocks, pack, queries]`` when ``keep``."""
    grid, queries, keys, sums, kept = _specs(q.shape, layout)
    outputs = [(queries, jax.ShapeDtypeStruct(q.shape, q.dtype))]
    outputs += [(sums, jax.ShapeDtypeStruct(kept, jnp.float32))] if keep else []
    specs, shapes = zip(*outputs, strict=True)
    return pl.pallas_call(
        functools.partial(_forward_kernel, size=layout.size, count=layout.count),
        grid=grid,
        in_specs=[queries, keys, keys],
        out_specs=specs,
        out_shape=shapes,
        **_options("packed_attention"),
    )(q, k, v)


def _backward(
    layout: Layout, q: Array, k: Array, v: Array, y: Array, lse: Array, dy: Array
) -> tuple[Array, ...]:
    """The gradients of q, k and v."""
    grid, queries, keys, sums, _ = _specs(q.shape, layout)
    tokens = q.shape[1]
    return pl.pallas_call(
        functools.partial(_backward_kernel, size=layout.size, count=layout.count),
        grid=grid,
        in_specs=[queries, keys, keys, queries, sums, queries],
        out_specs=(queries, keys, keys),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)),
        scratch_shapes=[
            pltpu.VMEM((LANES, tokens), k.dtype),
            pltpu.VMEM((tokens, LANES), jnp.float32),
            pltpu.VMEM((tokens, LANES), jnp.float32),
        ],
        **_options("packed_attention_backward"),
    )(q, k, v, y, lse, dy)


def _specs(shape: tuple[int, ...], layout: Layout) -> tuple[Any, ...]:
    """Grid; blocks of queries, of keys, of sums; the shape of all sums."""
    batch, tokens, width = shape
    n, pack, groups = layout.queries, LANES // layout.size, width // LANES
    grid = (batch, groups, tokens // n)
    queries = pl.BlockSpec((1, n, LANES), lambda row, group, i: (row, i, group))
    keys = pl.BlockSpec((1, tokens, LANES), lambda row, group, i: (row, 0, group))
    sums = pl.BlockSpec((1, 1, 1, pack, n), lambda row, group, i: (row, group, i, 0, 0))
    return grid, queries, keys, sums, (*grid, pack, n)


def _options(name: str) -> dict[str, Any]:
    params = pltpu.CompilerParams(dimension_semantics=PARALLEL, vmem_limit_bytes=VMEM)
    here = chips.target().platform == "tpu"
    return {"name": name, "compiler_params": params, "interpret": not here}


def _forward_kernel(q, k, v, y, *lse, size: int, count: int):
    q, k, v = q[0], k[0], v[0]  # [queries, 128], [n, 128], [n, 128]
    total, sums = 0.0, []
    for head in range(LANES // size):
        # S_h = q_h k^T, m = max S, P = exp(S - m), l = sum P
        scores = _real(_dot(_only(q, head, size), k, 1, 1), count, axis=1)  # [queries, n]
        top = jnp.max(scores, axis=1, keepdims=True)  # [queries, 1]
        p = jnp.exp(scores - top)
        mass = jnp.sum(p, axis=1, keepdims=True)
        # y = sum_h P_h v_h / l_h: v_h is 0 outside its own lanes, so heads do not mix
        total += _dot(p.astype(v.dtype), _only(v, head, size), 1, 0) / mass
        sums.append(top + jnp.log(mass))
    y[...] = jnp.asarray(total).astype(y.dtype)[None]
    for ref in lse:
        ref[0, 0, 0] = jnp.concatenate(sums, axis=1).T


def _backward_kernel(q, k, v, y, lse, dy, dq, dk, dv, turned, sum_k, sum_v, *, size, count):
    i, last = pl.program_id(2), pl.num_programs(2) - 1
    q, k, v, y, dy = q[0], k[0], v[0], y[0], dy[0]

    # Blocks of queries run one after the other on a core: dk and dv are summed in VMEM over them.
    @pl.when(i == 0)
    def _():
        turned[...] = k.T
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    # D = sum(y_h dy_h); scores are transposed, a query is a lane and its sums run over sublanes
    inner = (y.astype(jnp.float32) * dy.astype(jnp.float32)).T
    on_k, on_v, on_q = sum_k[...], sum_v[...], []
    for head in range(LANES // size):
        own = slice(head * size, (head + 1) * size)
        q_head, dy_head = _only(q, head, size), _only(dy, head, size)
        # P^T = exp(k q_h^T - lse), dv += P^T dy_h
        p = jnp.exp(_real(_dot(k, q_head, 1, 1), count, axis=0) - lse[0, 0, 0, head][None])
        on_v += _dot(p.astype(dy.dtype), dy_head, 1, 0)
        # dS^T = P^T (v dy_h^T - D), dk += dS^T q_h, dq_h^T = k_h^T dS^T
        ds = p * (_dot(v, dy_head, 1, 1) - jnp.sum(inner[own], axis=0, keepdims=True))
        ds = ds.astype(q.dtype)
        on_k += _dot(ds, q_head, 1, 0)
        on_q.append(_dot(turned[own, :], ds, 1, 0))
    sum_k[...], sum_v[...] = on_k, on_v
    dq[...] = jnp.concatenate(on_q, axis=0).T.astype(dq.dtype)[None]

    @pl.when(i == last)
    def _():
        dk[...] = sum_k[...].astype(dk.dtype)[None]
        dv[...] = sum_v[...].astype(dv.dtype)[None]


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product over one axis of each, in float32."""
    dims = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _only(x: Array, head: int, size: int) -> Array:
    """The group with its other heads set to 0."""
    if size == LANES:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // size == head, x, jnp.zeros_like(x))


def _real(scores: Array, count: int, axis: int) -> Array:
    """Scores with those of padded keys at minus infinity, or close to it."""
    if count == scores.shape[axis]:
        return scores
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    return jnp.where(key < count, scores, jnp.float32(-1e30))
