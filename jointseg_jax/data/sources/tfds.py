"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

A prepared folder in ArrayRecord format (``features.json``, ``dataset_info.json``, shards) opens
with ``builder_from_directory`` alone. Images and masks stay encoded (``SkipDecoding``) and are
decoded here, because TFDS turns palette masks into colours where OpenCV is installed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from jointseg_jax.data import captions as texts
from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes, Colour
from jointseg_jax.data.images import PIXEL_LIMIT, Decoding, decode_image, decode_segment_ids
from jointseg_jax.data.labels import LabelRule, named_classes
from jointseg_jax.data.records import BadSample, Record, derive
from jointseg_jax.data.segments import labels_of_segments
from jointseg_jax.types import UserError

Features = Mapping[str, Any]
"""A record as TFDS hands it out: arrays, bytes, and mappings of them."""

OBJECTS = ("id", "label", "is_crowd", "area")


@dataclass(frozen=True, kw_only=True)
class TFDS:
    """A split of a prepared TFDS folder, as a source of records.

    Features are named by their path, ``captions/text`` for the text within a sequence.
    """

    folder: str  # of one version, the one that holds ``features.json``
    split: str
    classes: Classes | str
    """A name of ``CLASS_LISTS``, or the path of a classes.json: TFDS names no classes of masks."""
    image: str = "image"  # the feature of the image
    labels: str = "segmentation_mask"
    """The feature of the label mask; of the panoptic picture when ``objects`` is given."""
    captions: str | None = None  # the feature of the captions; None: made from the labels
    id: str | None = None  # the feature of the id; None: split and index
    objects: str | None = None  # the feature of panoptic segments (id, label, is_crowd, area)
    void: tuple[int, ...] = (255,)  # file values without annotation
    first_label: int = 0  # file value of class 0
    label_map: tuple[tuple[int, int], ...] = ()
    """Pairs (file value, class), instead of ``first_label``; class -1 is void."""
    colour_map: tuple[tuple[Colour, int], ...] = ()
    """Pairs (RGB colour, file value), for labels painted in colours."""
    orientation: str = "refuse"  # of pictures that EXIF says are turned: refuse, apply or ignore
    pixel_limit: int = PIXEL_LIMIT  # most pixels an image may have
    version: str | None = None  # refuses any other version of the data set
    rule: LabelRule = field(init=False, repr=False)
    decoding: Decoding = field(init=False, repr=False)
    _records: Any = field(init=False, repr=False, compare=False)  # of the data source of TFDS
    _identity: tuple[str, str] = field(init=False, repr=False, compare=False)  # name and version

    def __post_init__(self) -> None:
        builder = open_folder(Path(self.folder), self.split, self.version)
        wanted = (self.image, self.labels, self.captions, self.id, self.objects)
        check_features(builder, Path(self.folder), [name for name in wanted if name])
        rule = LabelRule(
            void=self.void, shift=self.first_label, table=self.label_map, colours=self.colour_map
        )
        derive(
            self,
            rule=rule,
            decoding=Decoding(orientation=self.orientation, pixel_limit=self.pixel_limit),
            _records=builder.as_data_source(self.split, decoders=undecoded(builder)),
            _identity=(builder.name, str(builder.version)),
            classes=named_classes(self.classes),
        )

    def __reduce__(self) -> tuple[Callable[[], TFDS], tuple[()]]:
        # A copy in a worker opens the folder itself: readers do not travel.
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return functools.partial(TFDS, **fields), ()

    @property
    def _known(self) -> Classes:
        return cast(Classes, self.classes)  # a name or path only until ``__post_init__``

    @property
    def name(self) -> str:
        """Names the source by its data set, version and split."""
        return f"{self._identity[0]}:{self._identity[1]}/{self.split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Reads, decodes and checks one record."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        features = self._features(index)
        key = plain(pick(features, self.id)) if self.id else f"{self.split}-{index:07d}"
        where = f"{self.folder}: {self.split} record {index} ({key})"
        image = decode_image(pick(features, self.image), where, self.decoding)
        labels, segments = self._labels(features, where)
        record = Record(id=key, image=image, labels=labels, captions=self._captions(features))
        return texts.completed(record, segments, self._known, where)

    def original(self, index: int) -> bytes:
        """Returns the image file of a record as it was stored."""
        return pick(self._features(index), self.image)

    def _features(self, index: int) -> Features:
        try:
            return self._records[index]
        except (RuntimeError, ValueError, IndexError) as error:
            where = f"{self.folder}: {self.split} record {index}"
            found = f"the shard is damaged ({error})"
            remedy = "Copy the folder again from its source, or prepare it again."
            raise BadSample(where, found, "a whole shard", remedy) from None

    def _labels(self, features: Features, where: str) -> tuple[np.ndarray, np.ndarray | None]:
        data, limit = pick(features, self.labels), self.pixel_limit
        if self.objects is None:
            return self.rule.read(data, where, self._known, pixel_limit=limit), None
        # A sequence of objects comes as one array per name.
        columns = [pick(features, f"{self.objects}/{name}") for name in OBJECTS]
        rows = np.array(columns, np.int32).reshape(len(OBJECTS), -1).T
        return labels_of_segments(decode_segment_ids(data, where, pixel_limit=limit), rows, where)

    def _captions(self, features: Features) -> tuple[str, ...]:
        if self.captions is None:
            return ()
        value = pick(features, self.captions)
        listed = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        return tuple(texts.clean(plain(text), self.folder) for text in listed)

    def words(self) -> tuple[str, ...]:
        """Lists every word its captions can contain, sorted; reads all of them to know."""
        if self.captions is None:
            return tuple(sorted(texts.described_words(self._known)))
        every = (text for i in range(len(self)) for text in self._captions(self._features(i)))
        return tuple(sorted(texts.words_of(every)))

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        rules = (self.rule, self.orientation, self.image, self.labels, self.captions)
        return {
            "name": "tfds",
            "dataset": self._identity[0],
            "version": self._identity[1],
            "split": self.split,
            "count": len(self),
            "classes": list(self._known.names),
            "info": files.sha256(Path(self.folder) / "dataset_info.json")[:16],
            "rules": files.short_sum(repr(rules)),
        }


def open_folder(folder: Path, split: str, version: str | None) -> Any:
    """Opens a prepared folder; refuses other versions, formats and splits."""
    # Imported here because it takes most of a second, which runs on other sources should not pay.
    import tensorflow_datasets as tfds

    if not (folder / "features.json").is_file():
        raise UserError(
            f"ERROR [data] {folder}: no features.json in it; the folder of one prepared version is "
            "needed, such as ~/tensorflow_datasets/NAME/1.0.0. Set config.data.*.folder."
        )
    builder = tfds.builder_from_directory(str(folder))
    if version not in (None, str(builder.version)):
        raise UserError(
            f"ERROR [data] {folder}: is version {builder.version}; version {version} was asked "
            "for. Set config.data.*.version, or prepare that version."
        )
    stored = builder.info.file_format
    if stored is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"ERROR [data] {folder}: stored as {stored and stored.value}; array_record is needed "
            "for random access. Prepare it with file_format='array_record'."
        )
    base = split.partition("[")[0]
    if base not in builder.info.splits:
        have = ", ".join(builder.info.splits)
        raise UserError(
            f"ERROR [data] {folder}: no split {base!r}; there are: {have}. Set config.data.*.split."
        )
    return builder


def check_features(builder: Any, folder: Path, names: list[str]) -> None:
    """Refuses names of features that the data set does not have."""
    have = builder.info.features
    missing = [name for name in names if name.partition("/")[0] not in have]
    if missing:
        raise UserError(
            f"ERROR [data] {folder}: no feature {', '.join(map(repr, missing))}; it has: "
            f"{', '.join(sorted(have))}. Set config.data.*.image, labels, captions, id and objects "
            "to these."
        )


def undecoded(builder: Any) -> dict[str, object]:
    """Returns decoders that leave every image feature as it is stored."""
    # TFDS turns palette masks into colours where OpenCV is installed: this package decodes itself.
    import tensorflow_datasets as tfds

    features = builder.info.features.items()
    images = [name for name, feature in features if isinstance(feature, tfds.features.Image)]
    return {name: tfds.decode.SkipDecoding() for name in images}


def pick(features: Features, name: str) -> Any:
    """Returns the feature at a path such as ``captions/text``."""
    return functools.reduce(operator.getitem, name.split("/"), features)


def plain(value: object) -> str:
    """Returns text from the bytes that TFDS keeps it in."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
