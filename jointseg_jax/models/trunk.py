"""The U: in-blocks, a middle block and out-blocks, with long skips between the two halves.

1. ``state, left_i = step(in_block_i, state, None)``, ``i = 0 .. half - 1``, ``half = depth // 2``
2. ``state, _ = step(mid_block, state, None)``
3. ``state, _ = step(out_block_i, state, left_{half - 1 - i})``

A step runs one layer: a block of one stream, or the blocks of two streams and what passes between
them. Unrolled, the layers of a half lie under ``in_blocks/0``, ``in_blocks/1``, ...; with ``scan``
each leaf of ``in_blocks`` has a leading layer axis, and ``out_blocks`` is stacked mirrored (entry
``j`` joins in-block ``j``), which lets the reversed scan read the stored skips in place.
``weights.convert`` turns one into the other.

Source: U-ViT (arXiv 2209.12152) section 3.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jointseg_jax.models.attention import padding
from jointseg_jax.models.blocks import Block

REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attn_out"),
    ),
    "attn_out": jax.checkpoint_policies.save_only_these_names("attn_out"),
}
"""What the backward pass finds stored of each block; the rest it computes again. ``dots``: the
products with kernels, and what attention gives; ``attn_out``: the latter alone."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``(layer, state, what an in-layer left or None) -> (state, what an out-layer may read)``."""


class Stack(nn.Module):
    """Modules of one kind, named ``0``, ``1``, ..."""

    make: Any
    length: int

    def setup(self):
        self.all = [self.make(name=str(i)) for i in range(self.length)]


class Layers(NamedTuple):
    """The layers of a U; a half is one module to be scanned, or a sequence when unrolled."""

    inputs: Any
    middle: Any
    outputs: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trunk:
    """How deep a U is and what its blocks are; the fields are those of ``UViT``."""

    depth: int
    heads: int
    mlp_ratio: int | float
    norm: str
    join_norm: bool | None
    skip: bool
    qkv_bias: bool
    dtype: Any
    attention: str
    scan: bool
    remat: str

    @staticmethod
    def of(module: nn.Module) -> Trunk:
        """The trunk that a module's fields describe."""
        names = [field.name for field in dataclasses.fields(Trunk)]
        return Trunk(**{name: getattr(module, name) for name in names})

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
        """Makes one block."""
        block = Block
        if self.remat != "none":  # inside a scan nothing can be shared with the forward pass
            options = {"policy": REMAT[self.remat], "prevent_cse": not scanned}
            block = nn.remat(Block, static_argnums=(3,), **options)  # 3: the count of tokens
        return functools.partial(
            block,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            norm=self.norm,
            join_norm=self.norm == "post" if self.join_norm is None else self.join_norm,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
            attention=self.attention,
        )

    def blocks(self) -> nn.Module:
        """The blocks of one half, as ``stacked`` gives them."""
        return self.stacked(self.block(scanned=self.scan))

    def stacked(self, make: Callable[..., nn.Module]) -> nn.Module:
        """One module per layer of a half: under one name to be scanned, else a ``Stack``."""
        return make() if self.scan else Stack(make, self.half)

    def run(
        self, step: Step, state: Any, layers: Layers, taps: Sequence[str] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """The last state, and what the steps named by ``taps`` left."""
        inputs, outputs = (any(t.startswith(half) for t in taps) for half in ("in_", "out_"))
        state, left = self._half(step, state, layers.inputs, keep=self.skip or inputs)
        state, middle = step(layers.middle, state, None)
        skips = left if self.skip else None
        state, right = self._half(
            step, state, layers.outputs, skips=skips, mirrored=True, keep=outputs
        )

        def tapped(name: str) -> Any:
            if name == "mid_block":
                return middle
            half, i = name.split("/")
            if half == "in_blocks":
                return self._pick(left, int(i))
            return self._pick(right, self.half - 1 - int(i) if self.scan else int(i))

        return state, {name: tapped(name) for name in taps}

    def _half(
        self,
        step: Step,
        state: Any,
        layers: Any,
        *,
        skips: Any = None,
        mirrored: bool = False,
        keep: bool,
    ) -> tuple[Any, Any]:
        """One half of the layers; what they left lies in the order of the parameters."""
        if self.half == 0:
            return state, []
        if not self.scan:
            left = []
            for layer, skip in zip(layers, skips[::-1] if skips else [None] * self.half):
                state, kept = step(layer, state, skip)
                left.append(kept)
            return state, left

        def body(layer: Any, state: Any, skip: Any) -> tuple[Any, Any]:
            state, kept = step(layer, state, skip)
            return state, kept if keep else None

        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.half,
            reverse=mirrored,
        )
        return scanned(layers, state, skips)

    def _pick(self, left: Any, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], left) if self.scan else left[i]

    def padding(self, width: int, *counts: int) -> int:
        """How many tokens of padding suit layers that attend over so many; see ``attention``."""
        fields = {"dtype": self.dtype, "heads": self.heads, "size": width // self.heads}
        return padding(self.attention, *counts, **fields)

    def products(self, width: int, tokens: int) -> int:
        """Multiply-adds of one sample's pass through all blocks."""
        blocks, hidden = 2 * self.half + 1, int(width * self.mlp_ratio)
        per_token = blocks * (4 * width * width + 2 * width * hidden)
        per_token += self.half * 2 * width * width if self.skip else 0
        return tokens * per_token + self.attention_products(width, tokens)

    def attention_products(self, width: int, tokens: int) -> int:
        """Of these, the multiply-adds of scores and weighted sums."""
        return (2 * self.half + 1) * 2 * tokens * tokens * width
