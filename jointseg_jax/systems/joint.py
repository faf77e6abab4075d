"""Any set of streams denoised together by one network.

1. ``z_k = encode_k(batch[field_k])`` for every stream ``k``
2. ``t = times.draw``, ``n_k = process_k.source``, ``x_k = alpha_k(t_k) z_k + sigma_k(t_k) n_k``
3. ``loss = sum_k W_k mean(w_k(t_k) (network(x, t, text)_k - process_k.target(z_k, n_k, t_k))^2)``
   with ``W_k`` the weight of the stream and ``w_k(t)`` that of its process

4. a denoiser with self-conditioning reads, beside ``x``, an estimate of ``z``: when sampling, that
   of its call before (zeros in the first); in training, for every second row, that of a first
   call with zeros, held constant, and zeros for the others.

Text reaches the network as context (dropped to the empty prompt with probability ``text_drop``)
or as a stream of its own, whose time then says how much of it is known: 0 is a clean prompt and
``unconditional_time`` is pure noise, the unconditional network of classifier-free guidance.

Source: JoDiffusion (joint training and sampling), PDM Alg. 1 and 2, UniDiffuser; 4 analog bits,
Chen et al. 2022 (2208.04202) sec. 2.3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jointseg_jax.rng import fold
from jointseg_jax.systems.system import (
    LATENTS,
    READERS,
    Batch,
    Denoiser,
    Input,
    Pairs,
    Stream,
    TextEncoder,
)
from jointseg_jax.transport.guidance import Branch, Context, Guidance, Step, Times
from jointseg_jax.transport.integrator import Solver
from jointseg_jax.transport.times import TimeSampler
from jointseg_jax.types import Array, Params, Streams, require_values

TEXT_STREAM = "text"


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Streams, a denoiser and a solver."""

    streams: Mapping[str, Stream]  # in the order of the denoiser's streams
    denoiser: Denoiser
    times: TimeSampler  # of training
    solver: Solver  # from the source end to the data end
    size: tuple[int, int]  # (height, width) of the pairs in pixels
    text: TextEncoder | None = None
    text_drop: float = 0.1  # probability of the empty prompt in training (context text only)
    weights: str = "explicit"
    """``"explicit"`` uses each stream's weight; ``"elements"`` weighs streams by their number of
    elements, which is one mean over the concatenated vector (JoDiffusion)."""
    known: tuple[str, ...] = ()
    """Streams that the network always sees clean, at time 0, and is not trained to predict
    (JoDiffusion's ``image_only`` noise: text; PDM's given maps: mask)."""
    unconditional_time: float = 1.0
    """Time of the noise that stands for "no text" when text is a stream. 1 is the last trained
    time; 1.001 is label 1000, as JoDiffusion samples (never trained there)."""

    def __post_init__(self) -> None:
        known = self.weights in ("explicit", "elements")
        rule = "must be one of explicit, elements; change `system.weights`."
        require_values("joint", known, rule, weights=self.weights)
        rule = "must lie in [0, 1); change `system.text_drop`."
        require_values("joint", 0 <= self.text_drop < 1, rule, text_drop=self.text_drop)
        unknown = sorted(set(self.known) - set(self.streams))
        if unknown:
            raise ValueError(
                f"joint: known names {', '.join(unknown)} and the streams are "
                f"{', '.join(self.streams)}; change `system.known`."
            )
        if not any(s.weight > 0 for k, s in self.streams.items() if k not in self.known):
            raise ValueError(
                "joint: every stream is known or has weight 0, so nothing would be learnt; change "
                "`system.known` or the streams' weights."
            )
        if TEXT_STREAM in self.streams and self.text is None:
            raise ValueError(
                "joint: a `text` stream needs the encoder that makes its features; give "
                "`system.text`."
            )
        guided = [k for k, s in self.streams.items() if s.guidance != 1]
        if guided and self.text is None:
            raise ValueError(
                f"joint: {', '.join(guided)} ask for guidance and there is no text to be "
                "guided by; set their `guidance` to 1, or give `system.text`."
            )

    # ------------------------------------------------------------------ training

    def init(self, key: Array) -> Params:
        """Parameters of the denoiser and of the text encoder."""
        first, second = jax.random.split(key)
        # one row of everything: parameters do not depend on the batch
        latents = {k: jnp.zeros((1, *self.latent_shape(k)), jnp.float32) for k in self.streams}
        times = {k: jnp.zeros((1,), jnp.float32) for k in self.streams}
        words, context = {}, None
        if self.text is not None:
            words = self.text.init(second)
            context = self._context(words, self.text.empty(1))
        params = {"denoiser": self.denoiser.init(first, latents, times, context)["params"]}
        return params | ({"text": words} if words else {})

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Weighted squared error of what each stream's network output should be."""
        # (1) z_k = encode_k(batch[field_k])
        clean = self.encode(params, frozen, batch, keys)  # [b, h, w, c] each, text [b, l, d]
        context = self._training_text(params, batch, fold(keys, "drop"))  # [b, l, d] or None
        # (2) t = times.draw, n_k = process_k.source, x_k = alpha_k z_k + sigma_k n_k
        times = self.times.draw(fold(keys, "time"), tuple(self.streams))  # [b] each
        targets, noised = {}, {}
        for name, stream in self.streams.items():
            if name in self.known:
                noised[name], times[name] = clean[name], jnp.zeros_like(times[name])
                continue
            noise = self.source(name, keys)  # [b, h, w, c]
            noised[name] = stream.process.interpolate(clean[name], noise, times[name])
            targets[name] = stream.process.target(clean[name], noise, times[name])
        # (3) loss = sum_k W_k mean(w_k(t_k) (network(x, t, text)_k - target_k)^2)
        estimates = self._first_estimates(params, noised, times, context)
        outputs = self.denoise(params, noised, times, context, estimates)
        errors = {}
        for name, target in targets.items():
            squares = jnp.square(outputs[name] - target)
            errors[name] = jnp.mean(self.streams[name].process.weigh(squares, times[name]))
        weights = self._weights({k: clean[k] for k in targets})
        total = jnp.asarray(sum(weights[k] * errors[k] for k in targets if weights[k]))
        return total, {"loss": total} | {"loss/" + k: v for k, v in errors.items()}

    def encode(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Streams:
        """Clean latents of every stream, float32."""
        clean = {}
        for name, stream in self.streams.items():
            if LATENTS + name in batch:  # encoded beforehand, perhaps kept in half precision
                clean[name] = batch[LATENTS + name].astype(jnp.float32)
                continue
            values = batch[stream.field]
            if name == TEXT_STREAM:
                values = self._features(params, values)
            latents = stream.codec.encode(
                frozen.get(name, {}), values, keys=fold(keys, "encode/" + name)
            )
            # codecs are frozen, and a table of words that is a stream must not chase its noise
            clean[name] = jax.lax.stop_gradient(latents.astype(jnp.float32))
        return clean

    def inputs(self) -> dict[str, Input]:
        """The streams' fields with their codecs, and the text."""
        streams = {k: s for k, s in self.streams.items() if k != TEXT_STREAM}
        text = {} if self.text is None else {TEXT_STREAM: Input(TEXT_STREAM)}
        return {k: Input(s.field, s.codec) for k, s in streams.items()} | text

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """Pairs generated from the batch's text, and from its maps where the network needs them."""
        needed = [self.streams[k].field for k in self.known if k != TEXT_STREAM]
        condition = {field: batch[field] for field in needed}
        return self.generate(params, frozen, batch.get("text"), keys, condition=condition)

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        params: Params,
        frozen: Params,
        text: Array | None,
        keys: Array,
        *,
        condition: Streams | None = None,
    ) -> Pairs:
        """Generates one pair per key; see ``Generator.generate``.

        Raises:
          ValueError: a condition that is no stream's field, or a field of ``known`` is not there.
        """
        clean = self._encode_condition(params, frozen, text, condition or {}, keys)
        free = [k for k in self.streams if k not in clean]
        start = {k: self.source(k, keys) for k in free}  # [b, h, w, c] each
        guidance = self._guidance(params, text, free, keys)

        def network(x: Streams, t: Times, step: Step, memory: Streams) -> tuple[Streams, Streams]:
            # all branches of the guidance in one forward pass: [b * branches, h, w, c]
            asked, estimates = guidance.expand(x, t, step), guidance.repeat(memory)
            outputs = guidance.combine(self.denoise(params, *asked, estimates), t)
            return outputs, {k: self._data(k, outputs[k], x[k], t[k]) for k in memory}

        def without_memory(x: Streams, t: Times, step: Step) -> Streams:
            return network(x, t, step, {})[0]

        processes = {k: s.process for k, s in self.streams.items()}
        settings = {"keys": fold(keys, "solver"), "condition": clean}
        # (4) zeros in the first call
        memory = {k: jnp.zeros_like(start[k]) for k in self.denoiser.estimated if k in start}
        if memory:
            latents = self.solver(network, processes, start, memory=memory, **settings)
        else:
            latents = self.solver(without_memory, processes, start, **settings)
        assert isinstance(latents, Mapping)  # no trajectory was asked for
        return self.decode(frozen, latents)

    def check_condition(self, condition: Collection[str]) -> None:
        """Raises ValueError for fields that are no stream's, or if one that it must see lacks."""
        fields = {k: s.field for k, s in self.streams.items() if k != TEXT_STREAM}
        unknown = sorted(set(condition) - set(fields.values()))
        if unknown:
            raise ValueError(
                f"joint: given has {', '.join(unknown)} and the streams' fields are "
                f"{', '.join(fields.values())}; change `given`."
            )
        missing = [fields[k] for k in self.known if k in fields and fields[k] not in condition]
        if missing:
            raise ValueError(
                f"joint: the network was trained to see {', '.join(missing)}, and given has "
                f"{', '.join(condition) or 'nothing'}; add them to `given`."
            )

    def decode(self, frozen: Params, latents: Streams) -> Pairs:
        """What a person can use of clean latents: uint8 images, labels with their confidence."""
        out: Pairs = {}
        for name, stream in self.streams.items():
            reader, own = READERS[stream.codec.kind], frozen.get(name, {})
            out |= reader(stream.codec, stream.field, own, latents[name])
        return out

    def latent_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a stream's latents."""
        return tuple(self.streams[name].codec.latent_shape(self.size))

    def source(self, name: str, keys: Array, step: Array | None = None) -> Array:
        """Noise where a stream begins or, at a solver's step, where text is to say nothing."""
        # noise for "no text" is fresh at every step, and never that of a stream's start
        keys = fold(keys, "noise/" + name) if step is None else fold(fold(keys, "no text"), step)
        like = jnp.zeros((keys.shape[0], *self.latent_shape(name)), jnp.float32)
        return self.streams[name].process.source(keys, like)

    def denoise(
        self,
        params: Params,
        latents: Streams,
        times: Times,
        context: Context,
        estimates: Streams | None = None,
    ) -> Streams:
        """Network outputs in float32, shaped as the latents; times are one for all rows or [b]."""
        rows = next(iter(latents.values())).shape[0]
        # the network sees time labels, not times
        labels = {
            k: jnp.broadcast_to(s.process.schedule.label(times[k]), (rows,))
            for k, s in self.streams.items()
        }
        variables = {"params": params["denoiser"]}
        given = {"estimates": estimates} if estimates else {}
        outputs, _ = self.denoiser.apply(variables, latents, labels, context, **given)
        return {k: v.astype(jnp.float32) for k, v in outputs.items()}

    # ------------------------------------------------------------------- details

    def _first_estimates(
        self, params: Params, noised: Streams, times: Times, context: Context
    ) -> Streams:
        """(4) of training: estimates of every second row's data, zeros for the others."""
        names = [k for k in self.denoiser.estimated if k not in self.known]
        if not names:
            return {}
        x, t, text = jax.tree.map(lambda rows: rows[::2], (noised, times, context))
        outputs = self.denoise(jax.lax.stop_gradient(params), x, t, text)
        estimates = {}
        for name in names:
            data = jax.lax.stop_gradient(self._data(name, outputs[name], x[name], t[name]))
            both = jnp.stack([data, jnp.zeros_like(data)], axis=1)  # [b / 2, 2, h, w, c]
            estimates[name] = both.reshape(-1, *data.shape[1:])[: noised[name].shape[0]]
        return estimates

    def _data(self, name: str, output: Array, x: Array, t: Array) -> Array:
        """The data that an output implies, within the stream's bounds."""
        process = self.streams[name].process
        data = process.data(output, x, t)
        return data if process.clip is None else jnp.clip(data, -process.clip, process.clip)

    def _encode_condition(
        self, params: Params, frozen: Params, text: Array | None, condition: Streams, keys: Array
    ) -> Streams:
        """Clean latents of the streams that are not generated: text, and what is given."""
        self.check_condition(condition)
        clean = {}
        for name, stream in self.streams.items():
            if name == TEXT_STREAM:
                clean[name] = self._features(params, self._prompt(text, keys))
            elif stream.field in condition:
                key = fold(keys, "encode/" + name)
                clean[name] = stream.codec.encode(
                    frozen.get(name, {}), condition[stream.field], keys=key
                )
        return clean

    def _guidance(
        self, params: Params, text: Array | None, free: list[str], keys: Array
    ) -> Guidance:
        """How the network is asked, with guidance where a free stream asks for it."""
        if self.text is None:
            return Guidance(Branch())
        scales = {k: self.streams[k].guidance for k in free}
        given = {k: self.streams[k].guidance_interval for k in free}
        intervals = {k: interval for k, interval in given.items() if interval is not None}
        if TEXT_STREAM in self.streams:
            # "no text" is noise in place of the text's latents, at the time of pure noise
            unconditional = Branch(
                latents={TEXT_STREAM: lambda step: self.source(TEXT_STREAM, keys, step)},
                times={TEXT_STREAM: self.unconditional_time},
            )
            return Guidance(Branch(), [(unconditional, scales)], intervals)
        words, empty = params.get("text", {}), self.text.empty(keys.shape[0])
        conditional = Branch(text=self._context(words, self._prompt(text, keys)))
        unconditional = Branch(text=self._context(words, empty))
        return Guidance(conditional, [(unconditional, scales)], intervals)

    def _prompt(self, text: Array | None, keys: Array) -> Array:
        """The text, or the empty prompt for every row."""
        assert self.text is not None
        return self.text.empty(keys.shape[0]) if text is None else text

    def _features(self, params: Params, text: Array) -> Array:
        assert self.text is not None
        return self.text.features(params.get("text", {}), text)  # [b, l, d]

    def _context(self, words: Params, text: Array) -> Array | None:
        """Text features for the network's context tokens; None when text is a stream."""
        return None if TEXT_STREAM in self.streams else self._features({"text": words}, text)

    def _training_text(self, params: Params, batch: Batch, keys: Array) -> Array | None:
        """The batch's text as context, the empty prompt in a ``text_drop`` of the rows."""
        if self.text is None or TEXT_STREAM in self.streams:
            return None
        text = batch["text"]  # token ids [b, l] or features [b, l, d]
        if self.text_drop > 0:
            drop = jax.vmap(lambda k: jax.random.uniform(k) < self.text_drop)(keys)
            drop = drop.reshape((-1,) + (1,) * (text.ndim - 1))
            text = jnp.where(drop, self.text.empty(text.shape[0]).astype(text.dtype), text)
        return self._context(params.get("text", {}), text)

    def _weights(self, latents: Streams) -> dict[str, float]:
        if self.weights == "explicit":
            return {k: self.streams[k].weight for k in latents}
        sizes = {k: z.size * (self.streams[k].weight > 0) for k, z in latents.items()}
        return {k: size / sum(sizes.values()) for k, size in sizes.items()}
