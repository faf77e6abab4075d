"""Images and their label maps as the two ends of one flow: one network, both directions.

1. ``z_0 = encode(image)``, ``z_1 = encode(colours of the labels + perturbation)``: both data
2. ``t = times.draw`` in float32, ``x = (1 - t) z_0 + t z_1``
3. ``loss = mean w(t) (v(x, t) - (z_1 - z_0))^2``, over the cells that hold no VOID pixel where the
   palette has ``void="masked"``; w is the process's weight
4. segmentation: ``dz = v dt`` from ``z_0`` at 0 to 1, and the nearest colour; nothing is drawn
5. synthesis: from ``z_1`` at 1 to 0; another perturbation gives another image of the same map

``correction`` moves the velocity target by ``correction f(z')``, ``z' = x + (1 - t) v`` being the
network's own guess of the mask end, held constant. With the colours ``a_c``, the true class ``y``
and ``p_c = softmax(-|z' - a_c|^2 / (2 temperature^2))``

6. ``f(z') = temperature^-2 (a_y - sum_c p_c a_c)``

is the gradient of ``log p_y``: it pulls a guess to its own colour and pushes it from the others,
the more the nearer these are, and is all but zero where the guess is right. The squared error
alone fades near a colour, just where pixels change class.

Source: SemFlow (2405.20282), eqs. 9-14 and section 3.4; 6 is ours, after the idea of Wang et al.
2026 (2603.19218): a detached correction by distance, attractive and repulsive.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from einops import reduce
from jaxtyping import Float, Int

from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import quantise
from jointseg_jax.rng import fold
from jointseg_jax.systems.system import LATENTS, Batch, Denoiser, Input, Pairs, Stream
from jointseg_jax.transport.guidance import Step, Times
from jointseg_jax.transport.integrator import Solver
from jointseg_jax.transport.process import Process
from jointseg_jax.transport.times import TimeSampler
from jointseg_jax.types import VOID, Array, Params, Streams, require_values

STATE = "state"
"""The name of the bridge's one stream, for the denoiser and the solver."""

IMAGE = "image"
"""Where the image codec's parameters lie among the frozen ones."""


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """Two ends, a velocity and a solver."""

    mask: Chain  # labels -> colours (``first``) -> latents (``second``, the image's own codec)
    denoiser: Denoiser  # over the one stream ``state``; its output is a velocity
    process: Process  # linear, predicts velocity; data end the image, source end the mask
    times: TimeSampler  # of training
    solver: Solver  # Euler, Heun or adaptive; the direction sets its ``start`` and ``end``
    size: tuple[int, int]  # (height, width) of the pairs in pixels
    correction: float = 0.0  # of the velocity target by the distance to the colours; 0 is off
    temperature: float = 0.1  # distance in latents over which colours compete in the correction
    streams: ClassVar[Mapping[str, Stream]] = MappingProxyType({})  # its two ends share one state
    text: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.process.predicts != "velocity":
            raise ValueError(
                f"bridge: the process predicts {self.process.predicts}; between two data ends only "
                "a velocity is defined. Set `system.process.predicts` to velocity."
            )
        if self.process.schedule.t_max != 1 or float(self.process.schedule.alpha(1.0)) != 0:
            raise ValueError(
                f"bridge: {self.process.schedule} does not reach its source end at t = 1; set "
                "`system.process.schedule` to linear."
            )
        if self.denoiser.estimated:
            raise ValueError(
                "bridge: the network reads estimates of clean data and a bridge has two ends of "
                "data; set `system.denoiser.self_condition` to False."
            )
        own = {"correction": self.correction, "temperature": self.temperature}
        good = self.correction >= 0 and self.temperature > 0
        rule = "must be at least 0 and positive; change them in `system`."
        require_values("bridge", good, rule, **own)
        if self.correction and self.mask.latent_shape(self.size) != (*self.size, 3):
            raise ValueError(
                "bridge: the correction measures distances to colours, and the latents of "
                f"{type(self.mask.second).__name__} are no colours; set `system.correction` to 0, "
                "or `system.image` to pixels."
            )

    # ------------------------------------------------------------------ training

    def init(self, key: Array) -> Params:
        """Parameters of the velocity network."""
        state = jnp.zeros((1, *self.mask.latent_shape(self.size)), jnp.float32)
        time = jnp.zeros((1,), jnp.float32)
        return {"denoiser": self.denoiser.init(key, {STATE: state}, {STATE: time})["params"]}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Squared error of the velocity."""
        # (1) z_0 = encode(image), z_1 = encode(colours of the labels + perturbation)
        if LATENTS + IMAGE in batch:
            image = batch[LATENTS + IMAGE].astype(jnp.float32)
        else:
            image = self.encode_image(frozen, batch["image"], fold(keys, "encode/image"))
        mask = self.encode_mask(frozen, batch["labels"], fold(keys, "encode/mask"))  # [b, h, w, c]
        # (2) x = (1 - t) z_0 + t z_1
        t = self.times.draw(fold(keys, "time"), (STATE,))[STATE]  # [b]
        x = self.process.interpolate(image, mask, t)  # [b, h, w, c]
        velocity = self.velocity(params, x, t)
        target = self.process.target(image, mask, t)  # z_1 - z_0
        if self.correction:
            # z' = x + (1 - t) v, held constant: a target must not move to meet its prediction
            remaining = (1 - t).reshape(-1, 1, 1, 1)
            guess = jax.lax.stop_gradient(x + remaining * velocity)
            target = target + self.correction * self.class_correction(guess, batch["labels"])
        # (3) loss = mean w(t) (v(x, t) - target)^2 over the valid cells
        errors = self.process.weigh(jnp.square(velocity - target).mean(-1), t)  # [b, h, w]
        valid = self.valid_cells(batch["labels"], (errors.shape[1], errors.shape[2]))
        total = jnp.where(valid, errors, 0.0).sum() / jnp.maximum(valid.sum(), 1)
        return total, {"loss": total}

    def inputs(self) -> dict[str, Input]:
        """The image with its codec, and the labels: their colours are perturbed at every step."""
        return {IMAGE: Input("image", self.mask.second), "labels": Input("labels")}

    def encode_image(self, frozen: Params, image: Array, keys: Array | None = None) -> Array:
        """Latents of images; without keys nothing is drawn."""
        latents = self.mask.second.encode(frozen.get(IMAGE, {}), image, keys=keys)
        return jax.lax.stop_gradient(latents.astype(jnp.float32))

    def encode_mask(self, frozen: Params, labels: Array, keys: Array | None = None) -> Array:
        """Latents of label maps, perturbed where keys are given."""
        latents = self.mask.encode(frozen.get(IMAGE, {}), labels, keys=keys)
        return jax.lax.stop_gradient(latents.astype(jnp.float32))

    def velocity(self, params: Params, x: Array, t: Array) -> Array:
        """The network at states ``[b, h, w, c]`` and times (``[b]`` or one for all), in float32."""
        label = jnp.broadcast_to(self.process.schedule.label(t), x.shape[:1])
        variables = {"params": params["denoiser"]}
        outputs, _ = self.denoiser.apply(variables, {STATE: x}, {STATE: label})
        return outputs[STATE].astype(jnp.float32)

    @property
    def palette(self) -> Palette:
        """The colours of the classes."""
        return cast(Palette, self.mask.first)

    def class_correction(
        self, guess: Float[Array, "batch height width 3"], labels: Int[Array, "batch height width"]
    ) -> Float[Array, "batch height width 3"]:
        """How the velocity target moves, by the distances of a guess to the colours; 0 at VOID."""
        own = self.palette.encode({}, jnp.where(labels == VOID, 0, labels))  # a_y, [b, h, w, 3]
        ids = jnp.arange(self.palette.classes).reshape(-1, 1, 1)
        colours = self.palette.encode({}, ids).reshape(-1, 3)  # a_c, [classes, 3]
        inverse = self.temperature**-2
        squares = jnp.square(colours).sum(-1).reshape(1, 1, 1, -1)
        # -|z' - a_c|^2 / (2 temperature^2), less |z'|^2, which is the same for all classes
        scores = inverse * (jnp.einsum("bhwn,kn->bhwk", guess, colours) - squares / 2)
        # (6) f(z') = temperature^-2 (a_y - sum_c p_c a_c)
        mean = jnp.einsum("bhwk,kn->bhwn", jax.nn.softmax(scores, axis=-1), colours)
        return jnp.where((labels == VOID)[..., None], 0.0, inverse * (own - mean))

    def valid_cells(self, labels: Array, grid: tuple[int, int]) -> Array:
        """Cells of the latents ``[b, *grid]`` whose error is in the loss."""
        if self.palette.void != "masked":
            return jnp.ones((labels.shape[0], *grid), bool)
        # a cell counts if none of its pixels is VOID: the codec mixes all of them into it
        rows, columns = (n // m for n, m in zip(labels.shape[1:], grid))
        return reduce(labels != VOID, "b (h y) (w x) -> b h w", "min", y=rows, x=columns)

    # ---------------------------------------------------------------- generation

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """Images made from the batch's maps, beside the labels read off its images."""
        # from one end each: a preview shows both directions
        made = self.generate(params, frozen, None, keys, condition={"labels": batch["labels"]})
        read = self.generate(params, frozen, None, keys, condition={"image": batch["image"]})
        return made | {k: read[k] for k in ("labels", "confidence")}

    def generate(
        self,
        params: Params,
        frozen: Params,
        text: Array | None,
        keys: Array,
        *,
        condition: Streams | None = None,
    ) -> Pairs:
        """The other end of the condition, an image or labels; see ``Generator.generate``.

        Raises:
          ValueError: none or both of them are given.
        """
        del text  # a bridge has none
        condition = condition or {}
        self.check_condition(condition)
        directions = {"image": self.segment, "labels": self.synthesize}
        ((field, values),) = condition.items()
        return directions[field](params, frozen, values, keys)

    def check_condition(self, condition: Collection[str]) -> None:
        """Raises ValueError for anything but one end."""
        if set(condition) not in ({"image"}, {"labels"}):
            raise ValueError(
                f"bridge: given has {sorted(condition)}; a bridge leads from an image to its "
                "labels or from labels to an image: give exactly one of `image` and `labels`."
            )

    def segment(self, params: Params, frozen: Params, image: Array, keys: Array) -> Pairs:
        """Labels of images; the keys play no part."""
        del keys
        # (4) dz = v dt from z_0 at 0 to 1, and the nearest colour
        reached = self.integrate(params, self.encode_image(frozen, image), 0.0, 1.0)
        labels, confidence = self.mask.decode_with_confidence(frozen.get(IMAGE, {}), reached)
        return {"image": image, "labels": labels, "confidence": confidence}

    def synthesize(self, params: Params, frozen: Params, labels: Array, keys: Array) -> Pairs:
        """Images of label maps; each key perturbs its map's colours in its own way."""
        # (5) from z_1 at 1 to 0
        start = self.encode_mask(frozen, labels, fold(keys, "encode/mask"))
        reached = self.integrate(params, start, 1.0, 0.0)
        image = quantise(self.mask.second.decode(frozen.get(IMAGE, {}), reached))
        sure = jnp.ones(labels.shape, jnp.float32)
        return {"image": image, "labels": labels.astype(jnp.int32), "confidence": sure}

    def integrate(self, params: Params, x: Array, start: float, end: float) -> Array:
        """The state ``[b, h, w, c]`` at time ``end`` of one that is ``x`` at ``start``."""

        def network(states: Streams, times: Times, step: Step) -> Streams:
            del step
            return {STATE: self.velocity(params, states[STATE], times[STATE])}

        solver = replace(self.solver, start=start, end=end)
        states = solver(network, {STATE: self.process}, {STATE: x})
        assert isinstance(states, Mapping)  # no trajectory was asked for
        return states[STATE]
