"""The U: in-blocks, a middle block and out-blocks, with long skips between the two halves.

1. ``state, skip_i = step(in_block_i, state, None)``, ``i = 0 .. half - 1``, ``half = depth // 2``
2. ``state, _ = step(mid_block, state, None)``
3. ``state, _ = step(out_block_i, state, skip_{half - 1 - i})``

A step runs one layer: a block of one stream, or the blocks of two streams and what passes between
them. Unrolled, the layers of a half lie under ``in_blocks/0``, ``in_blocks/1``, ...; with ``scan``
each leaf of ``in_blocks`` has a leading layer axis, and ``out_blocks`` is stacked mirrored (entry
``j`` joins in-block ``j``). ``weights.convert`` turns one into the other.

Source: U-ViT (arXiv 2209.12152) section 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from jointseg_jax.models.attention import padding
from jointseg_jax.models.blocks import Block

REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # products with kernels, and what attention gives: recomputing it needs the scores again
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attn_out"),
    ),
    "attn_out": jax.checkpoint_policies.save_only_these_names("attn_out"),
}
"""Name -> what the backward pass finds stored of each block; the rest it computes again."""

State = TypeVar("State")
"""Tokens ``[b, n, width]`` of one stream, or of each of two streams; skips are of the same kind."""

Half = nn.Module | Sequence[nn.Module]
"""The layers of one half: one module to be scanned, or unrolled ones."""

Step = Callable[[nn.Module, State, State | None], tuple[State, State]]
"""``(layer, state, skip of an in-layer or None) -> (state, what is kept for skips and taps)``."""


class BlockList(nn.Module):
    """Modules of one kind, named ``0``, ``1``, ..."""

    make: Callable[..., nn.Module]
    length: int

    def setup(self):
        self.blocks = [self.make(name=str(i)) for i in range(self.length)]


class UBlocks(NamedTuple):
    """The layers of a U."""

    in_blocks: Half
    mid_block: nn.Module
    out_blocks: Half


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """How deep a U is and what its blocks are; fields as in ``uvit.Denoiser``."""

    depth: int
    heads: int
    mlp_ratio: int | float
    norm: str
    join_norm: bool | None
    skip: bool
    qkv_bias: bool
    dtype: DTypeLike
    attention: str
    activation: str
    scan: bool
    remat: str

    @staticmethod
    def of(module: nn.Module) -> Backbone:
        """Returns the backbone that a module's fields describe."""
        names = [field.name for field in dataclasses.fields(Backbone)]
        return Backbone(**{name: getattr(module, name) for name in names})

    @property
    def half(self) -> int:
        """Layers before the middle one, and after it."""
        return self.depth // 2

    @property
    def names(self) -> list[str]:
        """What ``taps`` may name."""
        inputs, outputs = ([f"{h}_blocks/{i}" for i in range(self.half)] for h in ("in", "out"))
        return [*inputs, "mid_block", *outputs]

    def block(self, *, scanned: bool = False) -> functools.partial:
        """Returns what makes one block."""
        block = Block
        if self.remat != "none":
            # In a scan the backward pass is another loop: XLA cannot undo the recomputation by
            # sharing it with the forward pass, and the barriers against that would cost.
            options = {"policy": REMAT[self.remat], "prevent_cse": not scanned}
            block = nn.remat(Block, static_argnums=(3,), **options)  # 3: ``count``, an int
        names = ("heads", "mlp_ratio", "norm", "qkv_bias", "dtype", "attention", "activation")
        own = {name: getattr(self, name) for name in names}
        join_norm = self.norm == "post" if self.join_norm is None else self.join_norm
        return functools.partial(block, join_norm=join_norm, **own)

    def blocks(self) -> nn.Module:
        """Returns the blocks of one half, as ``stacked`` makes them."""
        return self.stacked(self.block(scanned=self.scan))

    def stacked(self, make: Callable[..., nn.Module]) -> nn.Module:
        """Returns the layers of a half: one module to be scanned, else a ``BlockList``."""
        return make() if self.scan else BlockList(make, self.half)

    def run(
        self, step: Step[State], state: State, blocks: UBlocks, taps: Sequence[str] = ()
    ) -> tuple[State, dict[str, State]]:
        """Returns the last state, and what the steps named by ``taps`` kept."""
        inputs, outputs = (any(t.startswith(half) for t in taps) for half in ("in_", "out_"))
        half = functools.partial(self._half, step)
        state, skips = half(state, blocks.in_blocks, keep=self.skip or inputs)
        state, middle = step(blocks.mid_block, state, None)
        joined = skips if self.skip else None
        state, after = half(state, blocks.out_blocks, joined, mirrored=True, keep=outputs)

        def tapped(name: str) -> State:
            if name == "mid_block":
                return middle
            half, i = name.split("/")
            if half == "in_blocks":
                return self._pick(skips, int(i))
            # scanned out-blocks are stacked mirrored, so what they kept is too
            return self._pick(after, self.half - 1 - int(i) if self.scan else int(i))

        return state, {name: tapped(name) for name in taps}

    def _half(
        self,
        step: Step[State],
        state: State,
        layers: Half,
        skips: Any = None,
        *,
        mirrored: bool = False,
        keep: bool,
    ) -> tuple[State, Any]:
        """One half of the layers, and what they kept in the order of the parameters.

        That is a list, or with ``scan`` stacked arrays ``[half, ...]``; None unless ``keep``.
        """
        if self.half == 0:
            return state, []
        if not isinstance(layers, nn.Module):
            kept = []
            # the last skip that was kept is the first that is joined
            for layer, skip in zip(layers, reversed(skips) if skips else [None] * self.half):
                state, left = step(layer, state, skip)
                kept.append(left)
            return state, kept

        def body(layer: nn.Module, state: State, skip: State | None) -> tuple[State, State | None]:
            state, kept = step(layer, state, skip)
            return state, kept if keep else None  # what is returned is stored for every layer

        # Out-blocks run from the last entry to the first: entry j of the mirrored parameters joins
        # entry j of the skips, which the scan reads where the first scan wrote them.
        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.half,
            reverse=mirrored,
        )
        return scanned(layers, state, skips)

    def _pick(self, kept: Any, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], kept) if self.scan else kept[i]

    def padding(self, width: int, *counts: int) -> int:
        """Returns how many tokens of padding suit layers that attend over this many."""
        size = width // self.heads
        return padding(self.attention, *counts, dtype=self.dtype, heads=self.heads, size=size)

    def products(self, width: int, tokens: int) -> int:
        """Returns the multiply-adds of one sample's pass through all blocks."""
        blocks, hidden = 2 * self.half + 1, int(width * self.mlp_ratio)
        per_token = blocks * (4 * width * width + 2 * width * hidden)  # qkv and out; the MLP
        per_token += self.half * 2 * width * width if self.skip else 0  # the joins
        return tokens * per_token + self.attention_products(width, tokens)

    def attention_products(self, width: int, tokens: int) -> int:
        """Returns those of them that are scores and weighted sums."""
        return (2 * self.half + 1) * 2 * tokens * tokens * width
