"""What a compiled program does, read off its text, and the collectives that it cannot do without.

Of the text, products, collectives and estimated cycles:

1. ``dot``: ``2 x elements of the result x contracted length``.
2. ``convolution`` (TPUs write every product as one): ``2 x elements of the result x input
   features`` x, for each window dimension, the mean number of taps that fall on real input: exact
   under padding, stride and dilation, by which batch axes are often expressed.
3. A collective's bytes are those of the larger of what goes in and what comes out, on one device:
   what an all-gather makes, what a reduction is given. An asynchronous one is in several
   computations under one channel, and counts once.
4. XLA:TPU writes the cycles it expects of each fusion into the text; time = cycles / clock. Kernels
   of our own (``custom-call``) have none and are listed.

Collectives that an update needs at least, by the places of its parameters (``ideal_bytes``):

5. a parameter of n numbers that is whole on every chip: one all-reduce of its gradient, ``n``
6. split over ``fsdp``: gathered in the forward and in the backward pass, ``2 n``; its gradient
   reduce-scattered, ``n``, and the own part all-reduced over ``data``, ``n / fsdp``
7. whole, with its optimizer state split (zero1): gradient reduce-scattered, ``n``, and the new
   parameter gathered, ``n``

Each number has the dtype of the network's products; only the new parameters of 7 are float32. A
frozen parameter that is split is gathered once or, where a gradient passes through it, twice; once
is what counts here. Samplers need none.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import profiling, rules
from jointseg_jax.perf.hlo import Instruction, Module, Visit, num_bytes, sizes
from jointseg_jax.training.step import TrainStep

COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}

SCATTERED = re.compile(r"all-reduce-?_?scatter")
"""Computations in which an all-reduce is one half of a reduce-scatter."""

KERNELS = ("tpu_custom_call", "MosaicTPU", "mosaic", "cudnn")
"""Parts of the targets of custom calls that compute; the others only place or move buffers."""

SHORT = 256
"""Up to this number of tokens scores are small, and such an axis may be something else."""

TILES = (1, 8, 16, 128)
"""Multiples to which a number of tokens may be padded."""


class Traffic(NamedTuple):
    """Collectives of one kind: how many run, and their bytes on one device."""

    count: int
    bytes: int


class Costs(NamedTuple):
    """One run of a program on one device."""

    flops: int  # of its matrix products and convolutions
    collectives: dict[str, Traffic]  # by kind
    cycles: dict[str, int]  # as the compiler estimates, by part of the program
    kernels: dict[str, int]  # custom calls without an estimate -> how many run
    squares: tuple[str, ...] = ()  # types of buffers with two axes as long as attention's


def costs(module: Module, lengths: Sequence[int] = ()) -> Costs:
    """Counts everything in one pass.

    Args:
      lengths: numbers of tokens that attend to each other; the long ones may leave no squares.
    """
    # A kernel may pad its tokens, so a square of scores has any of these sides.
    sides = {-(-n // unit) * unit for n in lengths if n > SHORT for unit in TILES}
    fused, squares = module.fused(), {}
    flops, cycles, kernels = 0, collections.Counter(), collections.Counter()
    traffic: dict[str, Traffic] = {}
    seen: set[tuple[str, str]] = set()
    for visit in module.visits():
        # Everything below is multiplied by the trip counts of the loops around it.
        times, _, instruction = visit
        flops += times * product_flops(module, visit)
        # Scores inside a fused computation never reach memory.
        if sides and visit.computation not in fused:
            squares |= dict.fromkeys(_squares(instruction.type, sides))
        if kind := collective_kind(visit):
            # An asynchronous collective is in several computations under one channel.
            key = (kind, _channel(visit))
            if key not in seen:
                count, total = traffic.get(kind, Traffic(0, 0))
                moved = times * collective_bytes(module, visit)
                traffic[kind] = Traffic(count + times, total + moved)
            seen.add(key)
        if estimate := instruction.attribute(r'"estimated_cycles":"(\d+)"'):
            cycles[part_of(instruction)] += times * int(estimate)
        if instruction.op == "custom-call":
            # Kernels are listed, for the compiler cannot look into them.
            target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
            if any(word in target for word in KERNELS):
                kernels[target] += times
    return Costs(flops, traffic, dict(cycles.most_common()), dict(kernels), tuple(squares))


def _squares(type_text: str, sides: set[int]) -> list[str]:
    """The arrays of a type with two axes out of ``sides``."""
    return [
        f"{element}{list(dims)}".replace(" ", "")
        for element, dims in sizes(type_text)
        if sum(n in sides for n in dims) > 1
    ]


def product_flops(module: Module, visit: Visit) -> int:
    """FLOPs of one run of a ``dot`` or ``convolution``; 0 for anything else."""
    found = visit.instruction
    if found.op not in ("dot", "convolution"):
        return 0
    left, right, made = (sizes(t)[0][1] for t in (*module.operand_types(visit)[:2], found.type))
    if found.op == "convolution":
        return _convolution(found, left, right, made)
    # (1) 2 x elements of the result x contracted length
    axes = found.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = [left[int(axis)] for axis in axes.split(",") if axis]
    return 2 * math.prod(made) * math.prod(contracted)


def _convolution(convolution: Instruction, *shapes: tuple[int, ...]) -> int:
    # b01f_01io->b01f names each axis of input, kernel and result: batch, window, features.
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest).groups()
    taken, kernel, made = (dict(zip(names, shape)) for names, shape in zip(labels, shapes))
    # (2) 2 x elements of the result x input features, then x mean taps of each window dimension
    total = 2 * math.prod(made.values()) * kernel["i"]
    window = convolution.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(part.split("=") for part in window.split())
    spatial = sorted(axis for axis in kernel if axis.isdigit())

    def field(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(spatial)

    names = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    for axis, stride, pad, spread, step in zip(spatial, *(field(*n) for n in names.items())):
        # Of ``pad=low_high`` the low end says where the window starts; it may be negative.
        low = int(re.match(r"-?\d+", pad).group())
        sides = (taken[axis], kernel[axis], made[axis])
        total = total * _taps(*sides, int(stride), low, int(spread), int(step)) // made[axis]
    return total


@functools.cache
def _taps(taken: int, kernel: int, made: int, stride: int, low: int, spread: int, step: int) -> int:
    """Pairs (output position, tap of the window) that fall on an input, along one axis."""
    length, starts = (taken - 1) * spread + 1, np.arange(made, dtype=np.int64) * stride - low
    total = 0
    for tap in range(kernel):
        # Where this tap falls for every output position; between spread inputs there are zeros.
        at = starts + tap * step
        total += int(np.count_nonzero((at >= 0) & (at < length) & (at % spread == 0)))
    return total


def collective_kind(visit: Visit) -> str | None:
    """The kind of a collective, or None.

    An all-reduce of which only the own part is kept (``all-reduce-scatter``) is a reduce-scatter.
    """
    # Of an asynchronous pair the start counts, which has the operands.
    op = visit.instruction.op.removesuffix("-start")
    if op not in COLLECTIVES:
        return None
    return "reduce-scatter" if op == "all-reduce" and SCATTERED.match(visit.computation) else op


def _channel(visit: Visit) -> str:
    """What the computations that one collective is in have in common.

    Reductions of which a chip keeps its part all have the same channel, each its own computation.
    """
    if SCATTERED.match(visit.computation):
        return visit.computation
    return visit.instruction.attribute(r"channel_id=(\d+)") or visit.instruction.name


def collective_bytes(module: Module, visit: Visit) -> int:
    """Bytes of one run of a collective on one device: the larger of what goes in and comes out."""
    given = sum(map(num_bytes, module.operand_types(visit)))
    made = num_bytes(visit.instruction.type)
    if visit.instruction.op.endswith("-start") and visit.instruction.type.startswith("("):
        made -= given  # the type of a start repeats its operands
    return max(given, made)


def part_of(instruction: Instruction) -> str:
    """The part of the program that an instruction is of: its pass and its place in the network."""
    # JAX writes the path of modules and transformations: jit(f)/transpose(jvp(UViT))/mid_block/mlp
    name = instruction.attribute(r'op_name="([^"]*)"') or ""
    step = next((step for step, sign in PASSES.items() if re.search(sign, name)), None)
    if step is None:
        return ELSEWHERE
    words = [word for word in re.split(r"[/()]+", name) if word in PARTS]
    return f"{step} {words[-1] if words else 'rest'}"


ELSEWHERE = "outside the network"
NETWORKS = "|".join(kind.__name__ for kind in profiling.NETWORKS)

PASSES = {
    "recomputed": rf"rematted_computation.*({NETWORKS})|({NETWORKS}).*rematted_computation",
    "backward": rf"transpose\(jvp\(({NETWORKS})",
    "forward": rf"{NETWORKS}",
}
"""Passes through the network, by what JAX writes into the names of their operations."""

PARTS = {
    *("attn", "mlp", "qkv", "out", "fc1", "fc2", "attn_norm", "mlp_norm", "join", "join_skip"),
    *("join_norm", "norm", "context_in", "text_in", "image_in", "mask_in", "state_in", "clip_in"),
    *("text_out", "image_out", "mask_out", "state_out", "clip_out"),
}
"""Modules of the networks by which cycles are grouped, the innermost first."""


# ------------------------------------------------- collectives that there must be


def ideal_bytes(program: TrainStep, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of all collectives on one chip, counted as ``costs`` counts them.

    Args:
      dtype: of the network's products.
    """
    wire = jnp.dtype(dtype).itemsize
    # Averages are kept of the trained parameters alone.
    trained, places = set(rules.paths(program.state.ema)), rules.by_path(program.state.params)
    optimizer = rules.by_path(program.state.opt)
    split = [path for path, leaf in optimizer.items() if _parts(leaf.sharding) > 1]
    # Optimizer state lies under the path of its parameter: .../mu/PATH.
    moments = {p for p in places if any(path.endswith("/" + p) for path in split)}
    return sum(_needed(x, wire, p in trained, p in moments) for p, x in places.items())


def _parts(place: jax.sharding.NamedSharding) -> int:
    names = [n for axes in place.spec if axes for n in ([axes] if isinstance(axes, str) else axes)]
    return math.prod(place.mesh.shape[n] for n in names)


def _needed(leaf: jax.ShapeDtypeStruct, wire: int, trained: bool, split_moments: bool) -> int:
    """Bytes for one parameter, by rules 5 to 7 at the top."""
    numbers, parts, chips = leaf.size, _parts(leaf.sharding), leaf.sharding.mesh.size
    if chips == 1:
        return 0
    if parts > 1:
        if not trained:
            return wire * numbers
        # (6) 2 n gathered, n reduce-scattered, n / fsdp all-reduced if other axes have copies
        return wire * (3 * numbers + (numbers // parts if chips > parts else 0))
    if not trained:
        return 0
    # (7) n reduce-scattered and n gathered in float32; (5) n all-reduced
    return numbers * (wire + 4) if split_moments else numbers * wire
