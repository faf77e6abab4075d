"""U-ViT: every stream, the times and the text as tokens of one transformer with long skips.

1. tokens = [class?, times, data type?, context?, stream 1, stream 2, ...], each + its position.
2. the blocks of ``backbone``; out-block ``i`` joins the output of in-block ``depth // 2 - 1 - i``.
3. a norm; ``add_features`` adds one stream's tokens to another's; then one head per stream gives a
   prediction of the stream's own shape, in float32.

Because every part owns its position parameter, the order of the parts moves tokens about but
changes no prediction.

Parameter paths: ``class_token``, ``time_<stream>``, ``data_type``, ``context_in``, ``<stream>_in``,
``in_blocks``, ``mid_block``, ``out_blocks``, ``norm``, ``<stream>_out``.

Source: U-ViT (arXiv 2209.12152) sections 3 and 4; UniDiffuser (arXiv 2303.06555) section 4;
JoDiffusion (arXiv 2512.13014) section 3; PDM (arXiv 2412.02929) section 3, of which
``add_features`` is the mode with given maps.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from jointseg_jax.models.attention import ATTENTION
from jointseg_jax.models.backbone import REMAT as REMAT
from jointseg_jax.models.backbone import Backbone, UBlocks
from jointseg_jax.models.blocks import ACTIVATIONS, layer_norm
from jointseg_jax.models.embed import (
    IndexToken,
    Patches,
    Spec,
    TimeToken,
    Tokens,
    embed,
    head,
    head_products,
    spec_of,
)
from jointseg_jax.sharding import constrain
from jointseg_jax.types import Streams

NORMS = ("pre", "post")

Sizes = Mapping[str, Sequence[int]]
"""Latent height and width of patch streams that are not at their native size."""

Predictions = tuple[dict[str, Array], dict[str, Array]]
"""A prediction of every stream, in its shape; the tokens ``[b, n, width]`` of every tap."""

Rule = tuple[bool, str]
"""(holds, the message otherwise)."""


class Inputs(NamedTuple):
    """The arguments of one call."""

    latents: Streams
    times: Mapping[str, ArrayLike]
    text: Array | None
    class_id: Array | None
    data_type: Array | None
    estimates: Streams | None = None


class Denoiser(nn.Module):
    """The fields and the call that ``UViT`` and ``TwoStream`` share, and what they refuse."""

    streams: Mapping[str, Spec] | Sequence[tuple[str, Spec]]
    """(name, ``Patches`` | ``Tokens``) pairs, or a mapping; a spec may be a plain mapping with
    ``kind`` ("patches", "tokens") and the spec's fields, as configs write it. ``specs`` has them
    in one form."""
    time_tokens: Sequence[str]  # the streams whose time label becomes a token
    width: int  # of a token
    depth: int  # in-blocks + out-blocks (an odd number counts the middle block)
    heads: int  # of attention, in every block
    context: Tokens | None = None  # text that is read and not predicted
    classes: int = 0  # number of classes of a class token; 0 = no such token
    data_types: int = 0  # number of kinds of a data-type token; 0 = no such token
    mlp_ratio: int | float = 4  # hidden size of the MLPs / width
    norm: str = "pre"  # "pre" (U-ViT) or "post" (UniDiffuser)
    join_norm: bool | None = None  # a norm after each join; None = only with norm="post"
    add_features: Sequence[Sequence[str]] = ()
    """(from, to) pairs of streams with equally many tokens: those of ``from`` are added to those
    of ``to`` before the head of ``to``."""
    skip: bool = True  # False leaves the long skips out
    qkv_bias: bool = False  # a bias of queries, keys and values
    time_mlp: bool = False  # Linear-SiLU-Linear on every time token
    dtype: DTypeLike = "float32"  # of the matrix products; parameters and predictions are float32
    attention: str = "auto"  # a name of ``attention.ATTENTION``
    activation: str = "gelu"  # of the MLPs, a name of ``blocks.ACTIVATIONS``
    scan: bool = False  # one compiled block per half: less compile time, slower steps
    remat: str = "none"  # a name of ``REMAT``

    share = ()  # no field but in ``UViT``

    @property
    def together(self) -> tuple[str, ...]:
        """The streams that lie on the same tokens."""
        return tuple(self.share)

    @property
    def estimated(self) -> tuple[str, ...]:
        """The streams of whose data the network also reads an estimate (self-conditioning)."""
        return ()

    def __post_init__(self):
        where = type(self).__name__
        # configs give ConfigDicts, which have items() and are no Mapping; pairs may name one twice
        items = getattr(self.streams, "items", None)
        pairs = self.streams if items is None else items()
        self.streams = tuple((n, spec_of(s, where=f"{where}: streams.{n}")) for n, s in pairs)
        self.time_tokens = tuple(self.time_tokens)
        self.add_features = tuple(map(tuple, self.add_features))
        if self.context is not None:
            # a rule below refuses Patches
            self.context = cast(Tokens, spec_of(self.context, where=f"{where}: context"))
        self.dtype = jnp.dtype(self.dtype)
        rules = (*self._stream_rules(), *self.own_rules(), *self._block_rules(), self._pair_rule())
        if bad := [text for holds, text in rules if not holds]:
            raise ValueError(f"{where}: " + "; ".join(bad) + ".")
        super().__post_init__()

    @property
    def specs(self) -> dict[str, Spec]:
        """The streams by name, in their order."""
        return dict(self.streams)

    def __call__(
        self,
        latents: Streams,
        times: Mapping[str, ArrayLike],
        text: Array | None = None,
        *,
        class_id: Array | None = None,
        data_type: Array | None = None,
        estimates: Streams | None = None,
        taps: Sequence[str] = (),
    ) -> Predictions:
        """Predicts every stream; also returns the token arrays named by ``taps``.

        Args:
          latents: exactly the streams of the module.
          times: labels 0..1000 per stream, ``[batch]`` or one number for all.
          text: ``[batch, words, width]``, exactly when there is a ``context``.
          class_id: ``[batch]`` integers, exactly when there are ``classes``.
          data_type: ``[batch]`` integers; None stands for the last kind.
          estimates: of the data of streams in ``estimated``, in their shapes; zeros if not given.
          taps: names out of ``tap_names()``.

        Raises:
          ValueError: inputs that do not fit the module.
        """
        given = Inputs(latents, times, text, class_id, data_type, estimates)
        self.check_call(given, taps)
        return self.run(given, taps)

    @nn.nowrap
    def run(self, given: Inputs, taps: Sequence[str]) -> Predictions:
        """The call, of inputs that fit."""
        raise NotImplementedError

    # ---- what fields must be -------------------------------------------------------------------

    @nn.nowrap
    def own_rules(self) -> tuple[Rule, ...]:
        """Returns the rules of fields that only this kind of denoiser has."""
        return ()

    @nn.nowrap
    def _stream_rules(self) -> tuple[Rule, ...]:
        names = [n for n, _ in self.streams]
        taken = sorted({"class_token", "data_type", "context", *(f"time_{n}" for n in names)})
        # names become parameter paths: <name>_in, <name>_out
        good = all(isinstance(n, str) and n.isidentifier() and n not in taken for n in names)
        good = good and len(set(names)) == len(names) > 0
        known = bool(self.time_tokens) and set(self.time_tokens) <= set(names)
        words = self.context is None or isinstance(self.context, Tokens)
        even = 2 if self.heads % 2 else 1  # the sinusoid has as many cosines as sines
        fits = min(self.heads, self.width) > 0 and self.width % (even * self.heads) == 0
        return (
            (good, f"streams: one or more different identifiers, none of {taken}; given {names}"),
            (known, f"time_tokens: one or more of the streams {names}; given {self.time_tokens}"),
            (words, f"context: tokens or None; given {self.context}"),
            (fits, f"width: even and a multiple of heads={self.heads}; given {self.width}"),
            (self.depth >= 1, f"depth: at least 1; given {self.depth}"),
        )

    @nn.nowrap
    def _block_rules(self) -> list[Rule]:
        choices = {"norm": NORMS, "attention": ATTENTION, "remat": tuple(REMAT)}
        choices |= {"activation": tuple(ACTIVATIONS)}
        given = {field: getattr(self, field) for field in choices}
        rules = [
            (given[f] in allowed, f"{f}: one of {', '.join(allowed)}; given {given[f]!r}")
            for f, allowed in choices.items()
        ]
        half = self.dtype in (jnp.bfloat16, jnp.float16)
        text = f"attention: cudnn needs dtype bfloat16 or float16; given dtype={self.dtype}"
        return [*rules, (self.attention != "cudnn" or half, text)]

    @nn.nowrap
    def _pair_rule(self) -> Rule:
        extents = {n: spec.extent() for n, spec in self.specs.items()}
        shared = set(self.together)  # streams that share tokens share their features already
        good = all(
            len(p) == 2 and p[0] != p[1] and set(p) <= set(extents) and not set(p) <= shared
            for p in self.add_features
        )
        good = good and all(extents[a] == extents[b] for a, b in self.add_features)
        return good, (
            "add_features: (from, to) pairs of streams on tokens of their own, with the same rows "
            f"and columns of tokens; given {self.add_features} and tokens {extents}"
        )

    # ---- what a call must be -------------------------------------------------------------------

    @nn.nowrap
    def check_call(self, given: Inputs, taps: Sequence[str]) -> None:
        """Raises ValueError about the first input that does not fit."""
        where, specs = type(self).__name__, self.specs
        latents, times, text, class_id, data_type, estimates = given
        missing, unknown = sorted(set(specs) - set(latents)), sorted(set(latents) - set(specs))
        if missing or unknown:
            raise ValueError(
                f"{where}: the streams are {list(specs)}; latents lack {missing} and have "
                f"{unknown} besides; change the latents or `streams`."
            )
        for name, spec in specs.items():
            spec.check(latents[name].shape, where=f"{where}: stream {name!r}")
        batches = {n: z.shape[0] for n, z in latents.items()}
        batch = next(iter(batches.values()))
        if set(batches.values()) != {batch}:
            raise ValueError(f"{where}: the streams differ in batch size: {batches}.")
        for together in (self.together, *self.add_features):
            grids = {n: specs[n].extent(latents[n].shape[1:3]) for n in together}
            if len(set(grids.values())) > 1:
                raise ValueError(
                    f"{where}: streams that share tokens differ in their patches: {grids}."
                )
        for name, estimate in (estimates or {}).items():
            shape = latents[name].shape if name in self.estimated else None
            self._check_shape(f"estimates[{name!r}]", "self_condition", estimate, shape)
        if absent := [n for n in self.time_tokens if n not in times]:
            raise ValueError(
                f"{where}: times are {sorted(times)} and lack {absent} (`time_tokens`)."
            )
        for name in self.time_tokens:
            self._check_shape(f"times[{name!r}]", "", times[name], (), (batch,))
        row = (batch,)
        self._check_shape("class_id", "classes", class_id, row if self.classes else None)
        kinds = (None, row) if self.data_types else (None,)
        self._check_shape("data_type", "data_types", data_type, *kinds)
        words = None if self.context is None else (batch, *self.context.shape)
        self._check_shape("text", "context", text, words)
        if unknown := [t for t in taps if t not in self.tap_names()]:
            names = ", ".join(self.tap_names())
            raise ValueError(f"{where}: no tap {unknown}; the taps are {names}.")

    @nn.nowrap
    def _check_shape(
        self, what: str, field: str, value: ArrayLike | None, *wanted: tuple[int, ...] | None
    ) -> None:
        shape = None if value is None else jnp.shape(value)
        if shape not in wanted:
            message = f"{what} has shape {shape}, want {' or '.join(map(str, wanted))}"
            message += f"; change the input or `{field}`." if field else "."
            raise ValueError(f"{type(self).__name__}: {message}")

    @nn.nowrap
    def tap_names(self) -> list[str]:
        """Returns what ``taps`` may name."""
        raise NotImplementedError

    @nn.nowrap
    def input_shapes(self, batch: int = 1) -> dict[str, object]:
        """Returns keyword arguments of a call as ``ShapeDtypeStruct``, all at native sizes."""
        row = functools.partial(jax.ShapeDtypeStruct, (batch,))
        real = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        shapes: dict[str, object] = {
            "latents": {n: real((batch, *spec.shape)) for n, spec in self.specs.items()},
            "times": {n: row(jnp.float32) for n in self.specs},
        }
        if self.context is not None:
            shapes["text"] = real((batch, *self.context.shape))
        if self.classes:
            shapes["class_id"] = row(jnp.int32)
        if self.data_types:
            shapes["data_type"] = row(jnp.int32)
        if self.estimated:
            shapes["estimates"] = {n: real((batch, *self.specs[n].shape)) for n in self.estimated}
        return shapes


class UViT(Denoiser):
    """The denoiser of any number of streams, all as tokens of one transformer."""

    share: Sequence[str] = ()
    """Patch streams that lie on the same tokens, their embeddings summed: half the tokens for an
    image and its map, at the price of a shared width. The published networks share none."""

    def __post_init__(self):
        self.share = tuple(self.share)
        super().__post_init__()

    @nn.nowrap
    def own_rules(self) -> tuple[Rule, ...]:
        """Returns the rule of ``share``."""
        grids = {n: s.extent() for n, s in self.specs.items() if isinstance(s, Patches)}
        order = [n for n in grids if n in self.share]
        good = list(self.share) == order and len(order) > 1
        good = good and len({grids[n] for n in order}) == 1
        text = "share: two or more patch streams with the same rows and columns of patches, in "
        return ((not self.share or good, f"{text}the order of the streams; given {self.share}"),)

    def setup(self):
        backbone, index = Backbone.of(self), functools.partial(IndexToken, width=self.width)
        if self.classes:
            self.class_token = index(self.classes, dtype=self.dtype)
        self.time_embeds = {
            n: TimeToken(self.width, self.time_mlp, self.dtype, name=f"time_{n}")
            for n in self.time_tokens
        }
        if self.data_types:
            self.data_type = index(self.data_types, dtype=self.dtype)
        if self.context is not None:
            self.context_in = embed("context", self.context, self.width, self.dtype)
        if backbone.half:
            self.in_blocks, self.out_blocks = backbone.blocks(), backbone.blocks()
        self.mid_block = backbone.block()()
        self.last_norm = layer_norm("norm", self.dtype)
        self.setup_edges()

    def setup_edges(self) -> None:
        """Makes what turns latents into tokens, and tokens into predictions."""
        self.embeds = {n: embed(n, s, self.width, self.dtype) for n, s in self.specs.items()}
        self.stream_heads = {n: head(n, s) for n, s in self.specs.items()}

    @nn.nowrap
    def run(self, given: Inputs, taps: Sequence[str]) -> Predictions:
        """The call, of inputs that fit."""
        x, tapped = self.transform(self.embed(given), taps)
        features = with_added(self.add_features, self.features(x, given.latents))
        return self.predict(features, given.latents), tapped

    @nn.nowrap
    def transform(self, tokens: Array, taps: Sequence[str]) -> tuple[Array, dict[str, Array]]:
        """Returns the normed tokens after all blocks, ``[b, n, width]``, and the taps."""
        backbone = Backbone.of(self)
        within = [t for t in taps if t in backbone.names]
        count = tokens.shape[1]
        # padded once here, so that no layer's kernel has to pad; init gains nothing by it
        more = 0 if self.is_initializing() else backbone.padding(self.width, count)
        padded = jnp.pad(tokens, ((0, 0), (0, more), (0, 0))) if more else tokens

        def step(block: nn.Module, x: Array, skip: Array | None) -> tuple[Array, Array]:
            x = block(x, skip, count)
            return x, x  # the output is also the skip

        x, tapped = backbone.run(step, padded, self.blocks(), within)
        if more:
            x, tapped = jax.tree.map(lambda y: y[:, :count], (x, tapped))
        x = self.last_norm(x)
        return x, tapped | {n: a for n, a in {"tokens": tokens, "norm": x}.items() if n in taps}

    def embed(self, given: Inputs) -> Array:
        """Returns all tokens with their positions, ``[b, n, width]``."""
        tokens: dict[str, Array] = {}
        for name in self.specs:
            x = self.embeds[name](given.latents[name])
            shared_with = self.share[0] if name in self.share else name
            tokens[shared_with] = tokens[shared_with] + x if shared_with in tokens else x
        joined = [*self.conditions(given).values(), *tokens.values()]
        joined = jnp.concatenate(joined, axis=1)  # [b, n, width]
        return joined if self.is_initializing() else constrain(joined, "batch", "tokens", "width")

    def conditions(self, given: Inputs) -> dict[str, Array]:
        """Returns the tokens in front of the streams', ``[b, count, width]`` each."""
        latents, times, text, class_id, data_type, _ = given
        batch = next(iter(latents.values())).shape[0]
        parts: dict[str, Array] = {}
        if self.classes:
            parts["class_token"] = self.class_token(jnp.asarray(class_id))
        for name in self.time_tokens:
            label = jnp.broadcast_to(jnp.asarray(times[name], jnp.float32), (batch,))
            parts[f"time_{name}"] = self.time_embeds[name](label)
        if self.data_types:
            kind = jnp.full((batch,), self.data_types - 1) if data_type is None else data_type
            parts["data_type"] = self.data_type(jnp.asarray(kind))
        if text is not None:  # exactly when there is a context: ``check_call``
            parts["context"] = self.context_in(text)
        return parts

    def blocks(self) -> UBlocks:
        """Returns the blocks as ``Backbone.run`` takes them."""
        if self.depth == 1:
            return UBlocks((), self.mid_block, ())
        halves = (self.in_blocks, self.out_blocks)
        inputs, outputs = halves if self.scan else (half.blocks for half in halves)
        return UBlocks(inputs, self.mid_block, outputs)

    def features(self, x: Array, latents: Streams) -> dict[str, Array]:
        """Returns each stream's part of the normed tokens ``[b, n, width]``."""
        spans = self.spans({n: z.shape[1:3] for n, z in latents.items()})
        return {n: x[:, spans[n]] for n in self.specs}

    def predict(self, features: Mapping[str, Array], latents: Streams) -> dict[str, Array]:
        """Returns what each stream's head makes of its features, in the shape of its latents."""
        return {n: self.stream_heads[n](features[n], latents[n]) for n in self.specs}

    @nn.nowrap
    def spans(self, sizes: Sizes | None = None) -> dict[str, slice]:
        """Returns where each part lies among the tokens, in order; ``sizes`` as in ``Sizes``."""
        counts = {"class_token": 1} if self.classes else {}
        counts |= {f"time_{name}": 1 for name in self.time_tokens}
        counts |= {"data_type": 1} if self.data_types else {}
        counts |= {"context": self.context.count} if self.context is not None else {}
        sizes = sizes or {}
        counts |= {n: int(np.prod(s.extent(sizes.get(n)))) for n, s in self.specs.items()}
        # streams that share tokens lie where the first of them does and add none
        together = self.together
        own = {n: 0 if n in together[1:] else c for n, c in counts.items()}
        ends = dict(zip(own, np.cumsum(list(own.values())).tolist()))
        ends |= {n: ends[together[0]] for n in together}
        return {n: slice(ends[n] - c, ends[n]) for n, c in counts.items()}

    @nn.nowrap
    def tap_names(self) -> list[str]:
        """Returns what ``taps`` may name: the tokens before, after each block, after the norm."""
        return ["tokens", *Backbone.of(self).names, "norm"]


uvit = UViT
"""The constructor that configs name; it takes their plain mappings as they are."""


def with_added(pairs: Sequence[Sequence[str]], features: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the features of every stream, those of ``a`` added to ``b`` for each (a, b)."""
    return {n: sum((features[a] for a, b in pairs if b == n), x) for n, x in features.items()}


def forward_flops(module: UViT, sizes: Sizes | None = None) -> int:
    """Returns matrix-product FLOPs (2 per multiply-add) of one sample's forward pass, for MFU.

    Recomputation is not counted, nor norms, softmax, activations and the resize of positions.
    """
    (tokens,) = lengths(module, sizes)
    return 2 * (Backbone.of(module).products(module.width, tokens) + edge_products(module, sizes))


def lengths(module: UViT, sizes: Sizes | None = None) -> tuple[int, ...]:
    """Returns the numbers of tokens that attend to each other."""
    return (max(span.stop for span in module.spans(sizes).values()),)


def edge_products(module: UViT, sizes: Sizes | None = None) -> int:
    """Returns the multiply-adds of everything but the blocks."""
    d, spans = module.width, module.spans(sizes)
    total = len(module.time_tokens) * 8 * d * d if module.time_mlp else 0  # d x 4 d, 4 d x d
    if module.context is not None:
        total += module.context.products(d, module.context.count)
    counts = {n: spans[n].stop - spans[n].start for n in module.specs}
    return total + sum(head_products(spec, d, counts[n]) for n, spec in module.specs.items())
