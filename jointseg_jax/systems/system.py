"""The two protocols that loops know: an objective to train and a generator to sample from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jointseg_jax.types import Array, Params

Batch = Mapping[str, Array]
Pairs = dict[str, Array]

LATENTS = "latents/"
"""Before the name of an input: the batch field of its latents, where they were encoded beforehand
(``training/encode_plan.py``). It takes the place of the input's own field."""


class Input(NamedTuple):
    """A batch field that a loss reads, and the codec that it goes through first, if any."""

    field: str
    codec: Any = None


@runtime_checkable
class Objective(Protocol):
    """Something with parameters and a loss."""

    def init(self, key: Array) -> Params:
        """Fresh parameters."""
        ...

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The mean loss of a batch and its metrics (``loss`` among them); ``keys``: one per row."""
        ...

    def preview(self, params: Params, frozen: Params, batch: Batch, keys: Array) -> Pairs:
        """What a person should see during training: ``image`` uint8 and ``labels`` per row."""
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
    size: tuple[int, int]
    solver: Any
    streams: Mapping[str, Any]
    text: Any

    def check_condition(self, condition: Collection[str]) -> None:
        """Refuses (ValueError) batch fields that it cannot start from, or that it needs."""
        ...

    def generate(
        self,
        params: Params,
        frozen: Params,
        text: Array | None,
        keys: Array,
        *,
        condition: Pairs | None,
    ) -> Pairs:
        """``image`` uint8, ``labels`` int32 and ``confidence`` float32, one row per key."""
        ...
