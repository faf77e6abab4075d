"""Any set of streams denoised together by one network.

1. ``z_k = encode_k(batch[field_k])`` for every stream ``k``
2. ``t = times.draw``, ``n_k = process_k.source``, ``x_k = alpha_k(t_k) z_k + sigma_k(t_k) n_k``
3. ``loss = sum_k w_k mean((network(x, t, text)_k - process_k.target(z_k, n_k, t_k))^2)``

Text reaches the network as context (dropped to the empty prompt with probability ``text_drop``)
or as a stream of its own, whose time then says how much of it is known: 0 is a clean prompt and
``unconditional_time`` is pure noise, the unconditional network of classifier-free guidance.

Source: JoDiffusion (joint training and sampling), PDM Alg. 1 and 2, UniDiffuser.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jointseg_jax.codecs.pixels import quantise
from jointseg_jax.rng import fold
from jointseg_jax.systems.stream import Stream
from jointseg_jax.systems.system import LATENTS, Batch, Input, Pairs
from jointseg_jax.transport.guidance import Branch, guided
from jointseg_jax.types import Array, Params, Streams

TEXT_STREAM = "text"


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Streams, a denoiser and a solver.

    Attributes:
      streams: by name, in the order of the denoiser's streams.
      denoiser: Linen module ``(latents, times, text) -> (predictions, taps)``.
      times: draws training times.
      solver: from the source end to the data end.
      size: ``(height, width)`` of the pairs in pixels.
      text: text encoder, or None.
      text_drop: probability of the empty prompt in training (context text only).
      weights: ``"explicit"`` uses each stream's weight; ``"elements"`` weighs streams by their
        number of elements, which is one mean over the concatenated vector (JoDiffusion).
      known: streams the network always sees clean, at time 0, and is not trained to predict
        (JoDiffusion's ``image_only`` noise: text; PDM's given maps: mask).
      unconditional_time: time of the noise that stands for "no text" when text is a stream. 1 is
        the last trained time; 1.001 is label 1000, as JoDiffusion samples (never trained there).
    """

    streams: Mapping[str, Stream]
    denoiser: Any
    times: Any
    solver: Any
    size: tuple[int, int]
    text: Any = None
    text_drop: float = 0.1
    weights: str = "explicit"
    known: tuple[str, ...] = ()
    unconditional_time: float = 1.0

    def __post_init__(self) -> None:
        if self.weights not in ("explicit", "elements"):
            raise ValueError(
                f"joint: weights={self.weights!r}: must be one of explicit, elements; change "
                "`system.weights`."
            )
        if not 0 <= self.text_drop < 1:
            raise ValueError(
                f"joint: text_drop={self.text_drop}: must lie in [0, 1); change `system.text_drop`."
            )
        strangers = sorted(set(self.known) - set(self.streams))
        if strangers:
            raise ValueError(
                f"joint: known names {', '.join(strangers)} and the streams are "
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
        guided_streams = [k for k, s in self.streams.items() if s.guidance != 1]
        if guided_streams and self.text is None:
            raise ValueError(
                f"joint: {', '.join(guided_streams)} ask for guidance and there is no text to be "
                "guided by; set their `guidance` to 1, or give `system.text`."
            )

    # ------------------------------------------------------------------ training

    def init(self, key: Array) -> Params:
        """Parameters of the denoiser and of the text encoder."""
        first, second = jax.random.split(key)
        latents = {k: jnp.zeros((1, *self.latent_shape(k)), jnp.float32) for k in self.streams}
        times = {k: jnp.zeros((1,), jnp.float32) for k in self.streams}
        words = self.text.init(second) if self.text is not None else {}
        context = self._context(words, self.text.empty(1)) if self.text is not None else None
        params = {"denoiser": self.denoiser.init(first, latents, times, context)["params"]}
        return params | ({"text": words} if words else {})

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Weighted squared error of what each stream's network output should be."""
        clean = self.encode(params, frozen, batch, keys)
        context = self._training_text(params, batch, fold(keys, "drop"))
        times = self.times.draw(fold(keys, "time"), tuple(self.streams))
        targets, noised = {}, {}
        for name, stream in self.streams.items():
            if name in self.known:
                noised[name], times[name] = clean[name], jnp.zeros_like(times[name])
                continue
            noise = self.source(name, keys)
            noised[name] = stream.process.interpolate(clean[name], noise, times[name])
            targets[name] = stream.process.target(clean[name], noise, times[name])
        outputs = self.denoise(params, noised, times, context)
        errors = {k: jnp.mean(jnp.square(outputs[k] - targets[k])) for k in targets}
        weights = self._weights({k: clean[k] for k in targets})
        total = sum(weights[k] * errors[k] for k in targets if weights[k])
        return total, {"loss": total} | {"loss/" + k: v for k, v in errors.items()}

    def encode(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Streams:
        """Clean latents of every stream."""
        clean = {}
        for name, stream in self.streams.items():
            if LATENTS + name in batch:
                clean[name] = batch[LATENTS + name].astype(jnp.float32)
                continue
            values = batch[stream.field]
            if name == TEXT_STREAM:
                values = self.text.features(params.get("text", {}), values)
            key = fold(keys, "encode/" + name)
            latents = stream.codec.encode(frozen.get(name, {}), values, keys=key)
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
        condition: Pairs | None = None,
    ) -> Pairs:
        """Generates one pair per key.

        Args:
          text: token ids or features, one row per key; None is the empty prompt.
          condition: batch fields (``{"labels": ...}``) whose streams stay as they are.

        Raises:
          ValueError: a given field that is no stream's, or one of ``known`` that is not given.
        """
        batch = keys.shape[0]
        known = self._known(params, frozen, text, batch, condition or {}, keys)
        free = [k for k in self.streams if k not in known]
        start = {k: self.source(k, keys) for k in free}
        predict = self._guided(params, text, keys, free)
        processes = {k: s.process for k, s in self.streams.items()}
        latents = self.solver(predict, processes, start, keys=fold(keys, "solver"), condition=known)
        return self.decode(frozen, latents)

    def check_condition(self, condition: Collection[str]) -> None:
        """Refuses fields that are no stream's, and the lack of one that the network must see."""
        fields = {k: s.field for k, s in self.streams.items() if k != TEXT_STREAM}
        strangers = sorted(set(condition) - set(fields.values()))
        if strangers:
            raise ValueError(
                f"joint: given has {', '.join(strangers)} and the streams' fields are "
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
            out |= READERS[stream.codec.kind](stream, frozen.get(name, {}), latents[name])
        return out

    def latent_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a stream's latents."""
        return tuple(self.streams[name].codec.latent_shape(self.size))

    def source(self, name: str, keys: Array, step: Array | None = None) -> Array:
        """Noise where a stream begins or, at a solver's step, where text is to say nothing."""
        keys = fold(keys, "noise/" + name) if step is None else fold(fold(keys, "no text"), step)
        like = jnp.zeros((keys.shape[0], *self.latent_shape(name)), jnp.float32)
        return self.streams[name].process.source(keys, like)

    def denoise(
        self, params: Params, latents: Streams, times: Streams, context: Array | None
    ) -> Streams:
        """Network outputs in float32; the network sees time labels, not times."""
        rows = next(iter(latents.values())).shape[0]
        labels = {
            k: jnp.broadcast_to(s.process.schedule.label(times[k]), (rows,))
            for k, s in self.streams.items()
        }
        variables = {"params": params["denoiser"]}
        outputs, _ = self.denoiser.apply(variables, latents, labels, context)
        return {k: v.astype(jnp.float32) for k, v in outputs.items()}

    # ------------------------------------------------------------------- details

    def _known(
        self, params: Params, frozen: Params, text: Any, batch: int, condition: Pairs, keys: Array
    ) -> Streams:
        """Clean latents of the streams that are not generated."""
        self.check_condition(condition)
        known = {}
        for name, stream in self.streams.items():
            if name == TEXT_STREAM:
                ids = self.text.empty(batch) if text is None else text
                known[name] = self.text.features(params.get("text", {}), ids)
            elif stream.field in condition:
                key = fold(keys, "encode/" + name)
                known[name] = stream.codec.encode(
                    frozen.get(name, {}), condition[stream.field], keys=key
                )
        return known

    def _guided(self, params: Params, text: Array | None, keys: Array, free: list[str]) -> Any:
        """The network as the solver calls it, with guidance where a free stream asks for it."""

        def denoise(latents: Streams, times: Streams, context: Array | None) -> Streams:
            return self.denoise(params, latents, times, context)

        scales = {k: self.streams[k].guidance for k in free}
        words, batch = params.get("text", {}), keys.shape[0]
        if self.text is None:
            return guided(denoise, Branch(), [])
        if TEXT_STREAM in self.streams:
            conditional = Branch()
            unconditional = Branch(
                latents={TEXT_STREAM: lambda step: self.source(TEXT_STREAM, keys, step)},
                times={TEXT_STREAM: self.unconditional_time},
            )
        else:
            ids = self.text.empty(batch) if text is None else text
            conditional = Branch(text=self._context(words, ids))
            unconditional = Branch(text=self._context(words, self.text.empty(batch)))
        return guided(denoise, conditional, [(unconditional, scales)])

    def _context(self, words: Params, text: Array) -> Array | None:
        """Text features for the network's context tokens; None when text is a stream."""
        return None if TEXT_STREAM in self.streams else self.text.features(words, text)

    def _training_text(self, params: Params, batch: Batch, keys: Array) -> Array | None:
        if self.text is None or TEXT_STREAM in self.streams:
            return None
        text = batch["text"]
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


def _image(stream: Stream, params: Params, latents: Array) -> Pairs:
    return {stream.field: quantise(stream.codec.decode(params, latents))}


def _labels(stream: Stream, params: Params, latents: Array) -> Pairs:
    labels, confidence = stream.codec.decode_with_confidence(params, latents)
    return {stream.field: labels, "confidence": confidence}


def _panoptic(stream: Stream, params: Params, latents: Array) -> Pairs:
    labels, segments, confidence = stream.codec.read(params, latents)
    return {"labels": labels, "segments": segments, "confidence": confidence}


def _nothing(stream: Stream, params: Params, latents: Array) -> Pairs:
    return {}


READERS = {"image": _image, "labels": _labels, "panoptic": _panoptic, "latents": _nothing}
"""What a stream adds to a generated pair, by the kind of its codec."""
