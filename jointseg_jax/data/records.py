"""The one record schema of every data source, the check that a record obeys it, and what a model
must know of its source: it is kept in the workdir, which is all that sampling and evaluation need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np

from jointseg_jax.config import from_plain
from jointseg_jax.data.classes import Classes
from jointseg_jax.types import VOID


class Record(TypedDict):
    """One annotated picture, as every source hands it out."""

    id: str  # unique within its source
    image: np.ndarray  # uint8 [height, width, 3], RGB
    labels: np.ndarray  # int16 [height, width]: 0 .. classes-1, VOID where nothing is annotated
    captions: tuple[str, ...]  # may be empty
    segments: NotRequired[np.ndarray]  # int32 [height, width]: instance ids, 0 = no instance
    features: NotRequired[dict[str, np.ndarray]]  # float32, computed beforehand (``features.py``)


@runtime_checkable
class Source(Protocol):
    """Random access to records; picklable, so that loader processes can own a copy."""

    @property
    def name(self) -> str:
        """Names the source in messages and manifests."""
        ...

    @property
    def classes(self) -> Classes:
        """Says what the label values mean."""
        ...

    def __len__(self) -> int:
        """Counts the records."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Returns one record, or raises BadSample."""
        ...

    def words(self) -> tuple[str, ...]:
        """Lists every word its captions can contain, sorted."""
        ...

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        ...


def derive(frozen: object, **values: object) -> None:
    """Sets fields of a frozen dataclass that follow from its other fields."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


class BadReport(TypedDict):
    """A bad sample that a run met, as plain values."""

    index: int
    error: str
    replaced_by: NotRequired[int]  # the index of the good record read instead
    step: NotRequired[int]  # the step in whose batch it would have been


class BadSample(Exception):
    """One sample that cannot be used: where, what was found, what was expected, what to do."""

    def __init__(self, path: str, found: str, expected: str, remedy: str):
        # All four go to Exception.args, which is what pickle rebuilds an exception from.
        super().__init__(path, found, expected, remedy)
        self.path, self.found, self.expected, self.remedy = path, found, expected, remedy

    def __str__(self) -> str:
        return f"ERROR [data] {self.path}: {self.found}; {self.expected}. {self.remedy}"


def problem_lines(problems: Sequence[BadSample], most: int = 50) -> str:
    """Returns a line for each of the first problems, and how many more there are."""
    more = f"\n... and {len(problems) - most} more" if len(problems) > most else ""
    return "\n".join(map(str, problems[:most])) + more


def check_record(record: Mapping[str, object], classes: Classes, where: str | None = None) -> None:
    """Raises BadSample for a record that breaks the schema; ``where`` names it, or its own id."""
    where = where or str(record.get("id", "record without an id"))
    image = _array(record, "image", np.uint8, 3, where)
    labels = _array(record, "labels", np.int16, 2, where)
    if image.shape[2] != 3:
        found = f"image of shape {image.shape}"
        raise BadSample(where, found, "images have 3 channels", "Convert it to RGB.")
    maps = {"labels": labels}
    if "segments" in record:
        maps["segments"] = _array(record, "segments", np.int32, 2, where)
    for key, value in maps.items():
        if value.shape != image.shape[:2]:
            found = f"{key} is {value.shape[1]}x{value.shape[0]} (width x height)"
            rule = f"its image is {image.shape[1]}x{image.shape[0]}"
            remedy = "Give both files the same size; sizes are never changed silently."
            raise BadSample(where, found, rule, remedy)
    check_labels(labels, classes, where)
    captions = record.get("captions")
    if not isinstance(captions, tuple) or not all(isinstance(text, str) for text in captions):
        found = f"captions {captions!r}"
        raise BadSample(where, found, "captions are a tuple of str", "Fix the source.")


def check_labels(labels: np.ndarray, classes: Classes, where: str) -> None:
    """Raises BadSample, with the offending values and their counts, for labels out of range."""
    # Two passes without a mask: what all good labels take, and much faster than the mask below.
    if labels.size == 0 or (labels.min() >= VOID and labels.max() < len(classes)):
        return
    bad = (labels != VOID) & ((labels < 0) | (labels >= len(classes)))
    found = f"labels {counted(labels[bad])} out of range"
    rule = f"there are {len(classes)} classes (0-{len(classes) - 1}) and void {VOID}"
    remedy = "Fix the mask, or change the class list or label map of this source."
    raise BadSample(where, found, rule, remedy)


def counted(values: np.ndarray) -> str:
    """Lists different label values with their number of pixels, at most eight of them."""
    different, counts = np.unique(values, return_counts=True)
    listed = ", ".join(f"{v} ({n} px)" for v, n in zip(different[:8], counts[:8]))
    return listed + (f" and {len(different) - 8} more values" if len(different) > 8 else "")


def _array(
    record: Mapping[str, object], key: str, dtype: type[np.generic], ndim: int, where: str
) -> np.ndarray:
    value = record.get(key)
    if isinstance(value, np.ndarray) and value.dtype == dtype and value.ndim == ndim:
        return value
    is_array = isinstance(value, np.ndarray)
    actual = f"{value.dtype} {value.shape}" if is_array else type(value).__name__
    expected = f"it must be a {np.dtype(dtype)} array of {ndim} axes"
    raise BadSample(where, f"{key} is {actual}", expected, "Fix the source that made it.")


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a model must know of the data it was trained on."""

    classes: Classes
    vocabulary: tuple[str, ...]
    captions: tuple[str, ...]  # the default prompts

    @staticmethod
    def of(source: Source, *, captions: int = 512) -> DatasetInfo:
        """Reads it from a source, with the first caption of as many records."""
        found = []
        for i in range(min(captions, len(source))):
            with contextlib.suppress(BadSample):  # the pipeline reports it, by policy
                found += source[i]["captions"][:1]
        return DatasetInfo(source.classes, tuple(source.words()), tuple(found))

    def dump(self) -> str:
        """The info as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> DatasetInfo:
        """Reads what ``dump`` gave."""
        values = json.loads(path.read_text())
        classes = Classes(**from_plain(values["classes"]))
        return DatasetInfo(classes, tuple(values["vocabulary"]), tuple(values["captions"]))
