"""What loops ask of a system (an objective to train, a generator to sample from), and its parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

from jointseg_jax.codecs.codec import AnnotationCodec, Codec, PanopticCodec
from jointseg_jax.codecs.pixels import quantise
from jointseg_jax.transport.guidance import Interval, interval_of
from jointseg_jax.transport.integrator import Solver
from jointseg_jax.transport.process import Process
from jointseg_jax.types import Array, Params, Streams, require_values

Batch = Mapping[str, Array]
"""The fields of a batch, one row per example."""

Pairs = dict[str, Array]
"""``image`` uint8 [b, h, w, 3], ``labels`` int32 [b, h, w] and ``confidence`` float32 [b, h, w]."""

LATENTS = "latents/"
"""Before the name of an input: the batch field of its latents, where they were encoded beforehand
(``training/encode_plan.py``). It takes the place of the input's own field."""


@runtime_checkable
class Denoiser(Protocol):
    """A Linen module ``(latents, times, text) -> (predictions, taps)``; times are labels."""

    @property
    def estimated(self) -> tuple[str, ...]:
        """Streams of whose data it also reads an estimate, ``estimates=`` of its call."""
        ...

    def init(self, rngs: Array, /, *args: Any) -> Mapping[str, Any]:
        """Fresh variables for inputs of these shapes."""
        ...

    def apply(self, variables: Mapping[str, Params], /, *args: Any, **kwargs: Any) -> Any:
        """The predictions, one per stream and shaped as its latents, and what to look at beside."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """From the batch field ``text`` to features ``[b, words, width]``."""

    def init(self, key: Array) -> Params:
        """Parameters to train, ``{}`` if there are none."""
        ...

    def features(self, params: Params, text: Array) -> Array:
        """Features of token ids or of features that come with the record."""
        ...

    def empty(self, batch: int) -> Array:
        """The empty prompt: "no text", in training (text drop) and in guidance."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How one batch field becomes latents, and how these move between data and source."""

    field: str  # the batch field that the codec encodes ("image", "labels", ...)
    codec: Codec  # between the field's values and latents
    process: Process  # between clean latents and their source, and what the network predicts of it
    weight: float = 1.0  # of the stream's mean squared error in the loss; 0 leaves it out
    guidance: float = 1.0
    """Scale of classifier-free guidance at sampling, ``uncond + scale (cond - uncond)``; 1 is
    off."""
    guidance_interval: Interval | None = None
    """Times (low, high) at which ``guidance`` holds, 0 the data end and 1 the source end; it is 1
    at others. None is all times."""

    def __post_init__(self) -> None:
        own = {"weight": self.weight, "guidance": self.guidance}
        rule = "must both be at least 0; change them in the stream's config."
        where = f"stream {self.field!r}"
        require_values(where, min(own.values()) >= 0, rule, **own)
        if self.guidance_interval is not None:  # a list, in JSON
            interval = interval_of(where, self.guidance_interval)
            object.__setattr__(self, "guidance_interval", interval)


def _image(codec: Codec, field: str, params: Params, latents: Array) -> Pairs:
    return {field: quantise(codec.decode(params, latents))}  # uint8


def _labels(codec: Codec, field: str, params: Params, latents: Array) -> Pairs:
    parts = cast(AnnotationCodec, codec).decode_with_confidence(params, latents)
    return dict(zip((field, "confidence"), parts))


def _panoptic(codec: Codec, field: str, params: Params, latents: Array) -> Pairs:
    parts = cast(PanopticCodec, codec).read(params, latents)
    return dict(zip(("labels", "segments", "confidence"), parts))


def _nothing(codec: Codec, field: str, params: Params, latents: Array) -> Pairs:
    return {}


READERS = {"image": _image, "labels": _labels, "panoptic": _panoptic, "latents": _nothing}
"""What a person can use of latents, as fields of a pair, by the kind of their codec."""


class Input(NamedTuple):
    """A batch field that a loss reads, and the codec that it goes through first, if any."""

    field: str
    codec: Codec | None = None


@runtime_checkable
class Objective(Protocol):
    """Something with parameters and a loss."""

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        ...

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The mean loss of a batch, and its metrics with ``loss`` among them.

        Args:
          params: what is trained.
          frozen: parameters of the codecs, by the names of their streams.
          keys: ``[b]``, one per row: a row's draws do not depend on the rows beside it.
        """
        ...

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """What a person should see during training, one pair per row."""
        ...


@runtime_checkable
class Encodable(Protocol):
    """An objective whose codecs do not change, so that their latents can be kept."""

    def inputs(self) -> dict[str, Input]:
        """All that ``loss`` reads of a batch, by the names of the codecs' parameters."""
        ...


@runtime_checkable
class Generator(Protocol):
    """Something that makes pairs, with a solver."""

    __dataclass_fields__: ClassVar[dict[str, Any]]  # a dataclass, for ``dataclasses.replace``

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pairs in pixels."""
        ...

    @property
    def solver(self) -> Solver: ...

    @property
    def streams(self) -> Mapping[str, Stream]:
        """The streams with weights and guidance of their own; none where two ends share a state."""
        ...

    @property
    def text(self) -> TextEncoder | None: ...

    def check_condition(self, condition: Collection[str]) -> None:
        """Raises ValueError for fields that it cannot start from, or if one that it needs lacks."""
        ...

    def generate(
        self,
        params: Params,
        frozen: Params,
        text: Array | None,
        keys: Array,
        *,
        condition: Streams | None = None,
    ) -> Pairs:
        """Generates one pair per key.

        Args:
          params: the trained parameters.
          frozen: parameters of the codecs, by the names of their streams.
          text: token ids or features, ``[b, words, ..]``; None is the empty prompt.
          keys: ``[b]``; a pair depends on its own key, text and condition alone.
          condition: batch fields to start from, such as ``{"labels": [b, h, w]}``: what they stand
            for stays as it is.

        Raises:
          ValueError: by ``check_condition``.
        """
        ...
