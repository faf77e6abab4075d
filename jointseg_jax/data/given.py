"""What a user feeds to a sampler: the label maps or images of a folder, one by one.

1. ``plain``: every picture under the folder, also nested. Labels are PNG of class indices with 255
   void, unless a ``classes.json`` beside them says what their values mean; ``captions.jsonl``, if
   there, has a caption for every id. An id is a path below the folder without its ending.
2. any other layout: the images or the labels of a split of it (``layouts.py``).
3. Headers are checked at the start, all files at once; pixels when an item is loaded.
4. ``load`` resizes as ``transforms.Resize`` does in evaluation: centre crop, or stretch.
"""

import dataclasses
import functools
import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.files import Files
from jointseg_jax.data.images import CONVERSIONS, PIXEL_LIMIT, Decoding, open_picture
from jointseg_jax.data.labels import LabelRule, read_classes, stored_rule
from jointseg_jax.data.records import BadSample, problem_lines
from jointseg_jax.data.sources.caption_files import captions_of
from jointseg_jax.data.sources.folders import label_files, list_split, read_image, read_labels
from jointseg_jax.data.sources.layouts import (
    LAYOUTS,
    Entry,
    SplitIndex,
    find,
    left_out,
    pair,
)
from jointseg_jax.data.transforms import BOXES, Resize, resize_image, resize_labels
from jointseg_jax.data.workers import in_order
from jointseg_jax.types import UserError

PLAIN = "plain"
# No labels go with a given image, so a picture that EXIF says is turned can be turned.
TURNED = Decoding(orientation="apply")
THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Given:
    """Label maps or images of a folder, in the order of their ids."""

    root: Path
    entries: tuple[Entry, ...] = field(repr=False, compare=False)  # the digest tells them apart
    classes: Classes | None  # of the labels; None for images
    rule: LabelRule | None  # what values of label files mean; None: images, segments, parts
    layout: str
    mode: str  # ``crop`` shows the centre, ``stretch`` the whole
    digest: str = ""  # SHA-256 over ids, file contents and label rule

    def __post_init__(self) -> None:
        Resize(size=1, mode=self.mode)  # knows the modes

    def __len__(self) -> int:
        return len(self.entries)

    @functools.cached_property
    def files(self) -> Files:
        """The files of the folder, with its list of sums."""
        return Files.of(self.root)

    @property
    def kind(self) -> str:
        """``labels`` or ``images``."""
        return "images" if self.classes is None else "labels"

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Names the items."""
        return tuple(entry.id for entry in self.entries)

    @property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """Returns the captions of every item, which may be none."""
        return tuple(entry.captions for entry in self.entries)

    def load(
        self, index: int, size: int | tuple[int, int]
    ) -> Int16[np.ndarray, "height width"] | UInt8[np.ndarray, "height width 3"]:
        """Returns one item at ``size``, labels or RGB; raises BadSample for a broken file."""
        # The box of evaluation, which draws nothing: the generator is never asked.
        resize = Resize(size=size, mode=self.mode)
        whole = self.read(index)
        box = BOXES[self.mode](resize, whole.shape[:2], np.random.default_rng(0), False)
        filtered = resize_image if self.classes is None else resize_labels
        return filtered(whole, resize.target, box)

    def read(self, index: int) -> np.ndarray:
        """Returns one item at its own size."""
        entry = self.entries[index]
        if self.classes is None:
            return read_image(self.files, entry, TURNED)
        return read_labels(self.files, entry, self.rule, self.classes)[0]

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when an interrupted run goes on."""
        place = {"kind": self.kind, "layout": self.layout, "mode": self.mode}
        return {**place, "count": len(self), "sha256": self.digest}

    def examine(self, index: int) -> str | BadSample:
        """Checks the headers of one item; returns the digest of its files, or what is wrong."""
        entry = self.entries[index]
        names = (entry.image,) if self.classes is None else label_files(entry)
        # The rows of segments are in no file of their own: the JSON holds those of all images.
        digest = hashlib.sha256(b"" if entry.segments is None else entry.segments.tobytes())
        try:
            for name in names:
                path, data = self.files.read(name)
                digest.update(hashlib.sha256(data).digest())
                if not self._expects(open_picture(data, str(path), PIXEL_LIMIT), entry):
                    self.read(index)  # decodes it, which raises what is wrong
        except BadSample as problem:
            return problem
        return digest.hexdigest()

    def _expects(self, picture: Image.Image, entry: Entry) -> bool:
        """Returns True if a header is of a kind that decodes without questions."""
        if self.classes is None:
            return picture.mode in CONVERSIONS
        painted = picture.mode in ("RGB", "RGBA")
        paints = self.rule is None or bool(self.rule.colours)
        return picture.format == "PNG" and (painted == paints or bool(entry.parts))


def given_labels(
    folder: str | Path,
    classes: Classes,
    *,
    layout: str = PLAIN,
    split: str = "",
    mode: str = "crop",
) -> Given:
    """Lists label maps for a model of ``classes``; raises UserError with all that is wrong."""
    listing = listing_of(Path(folder), layout, split, stored_rule(len(classes)))
    if listing.classes is not None:  # None: plain PNG files of the model's own indices
        check_names(listing.classes, classes, folder)
    return checked(listing, Path(folder), classes, layout, mode)


def given_images(
    folder: str | Path, *, layout: str = PLAIN, split: str = "", mode: str = "crop"
) -> Given:
    """Lists images; raises UserError with all of those that cannot be used."""
    listing = listing_of(Path(folder), layout, split, None)
    return checked(listing._replace(rule=None), Path(folder), None, layout, mode)


def listing_of(root: Path, layout: str, split: str, rule: LabelRule | None) -> SplitIndex:
    """Lists a folder in its layout; ``rule`` is that of plain labels, None for images."""
    known = (PLAIN, *LAYOUTS)
    if layout not in known:
        raise UserError(
            f"ERROR [given] layout {layout!r} of {root} is unknown; one of: {', '.join(known)}."
        )
    if bool(split) != (layout != PLAIN):
        raise UserError(
            f"ERROR [given] {root}: layout {layout!r} with split {split!r}; the layout {PLAIN!r} "
            "is one folder without splits, every other one needs the name of a split."
        )
    try:
        return list_plain(root, rule) if layout == PLAIN else list_split(root, split, layout)
    except (UserError, BadSample) as problem:
        kind = "images" if rule is None else "labels"
        raise UserError(
            f"{problem}\nERROR [given] {root}: no {kind} can be listed in the layout {layout!r}. "
            "Fix the folder, or give another folder, layout or split."
        ) from None


def list_plain(root: Path, rule: LabelRule | None) -> SplitIndex:
    """Lists every picture under a folder."""
    if not root.is_dir():
        raise UserError(f"ERROR [given] {root}: {'not a' if root.exists() else 'no such'} folder.")
    pictures = find(root, ".", ".png")
    classes, sides, kind = None, (pictures, None), f"images in it ({', '.join(files.PICTURES)})"
    if rule is not None:
        sides, kind = (None, pictures), "labels in it (.png)"
        if files.inside(root, "classes.json").exists():
            classes, rule = read_classes(root / "classes.json")
    texts = captions_of(root, "", ".", pictures.ids)
    entries = pair(root, pictures.ids, *sides, texts)
    if not entries and not pictures.problems:
        here = sorted({path.suffix or path.name for path in root.iterdir()})
        there = ", ".join(here[:20]) or "no files"
        raise UserError(f"ERROR [given] {root}: no {kind}; there are: {there}.")
    return SplitIndex(entries, texts.problems + left_out(pictures), classes, rule)


def checked(
    listing: SplitIndex, root: Path, classes: Classes | None, layout: str, mode: str
) -> Given:
    """Reads all headers; refuses the folder if anything is wrong, with everything that is."""
    problems = [*listing.problems, *(e.problem for e in listing.entries if e.problem)]
    entries = tuple(entry for entry in listing.entries if not entry.problem)
    given = Given(
        root=root, entries=entries, classes=classes, rule=listing.rule, layout=layout, mode=mode
    )
    seen = list(in_order(given.examine, range(len(given)), THREADS))
    problems += [finding for finding in seen if isinstance(finding, BadSample)]
    if problems:
        hint = f" A data set folder needs its layout ({', '.join(LAYOUTS)}) and split."
        hint = hint if layout == PLAIN else ""
        raise UserError(
            f"{problem_lines(problems)}\nERROR [given] {root}: problems: {len(problems)}, "
            f"{given.kind} found: {len(listing.entries)}. Fix or remove them.{hint}"
        )
    # Any other folder, or rule, is another digest: a run that goes on refuses it.
    rows = repr((given.ids, seen, given.rule)).encode()
    return dataclasses.replace(given, digest=hashlib.sha256(rows).hexdigest())


def check_names(theirs: Classes, ours: Classes, where: str | Path) -> None:
    """Refuses labels of classes that are not the model's, naming the first difference."""
    rows = itertools.zip_longest(theirs.names, ours.names, fillvalue="absent")
    for index, (there, here) in enumerate(rows):
        if there != here:
            raise UserError(
                f"ERROR [given] {where}: class {index} is {there!r} there and {here!r} in the "
                f"model ({len(theirs)} and {len(ours)} classes); names and order must be equal. "
                "Give labels of the model's classes, or put the label files into one folder with "
                "a classes.json that lists the model's classes and has a label_map {file value: "
                "class name or null}, and give that as plain."
            )
