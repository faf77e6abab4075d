"""An endless procedural source: things on stuff, where every category owns a hue.

1. Scene (seed, split, index) is drawn by the Philox generator of key (2 seed + split, index), so
   scenes are independent of each other, and the splits cannot meet.
2. Geometry lives in [0, 1] x [0, 1] (y downwards): the same scene at any resolution, up to
   rasterisation. A pixel belongs to exactly one category; nothing is blended across borders.
3. The colour of a pixel is ``value * (1 - saturation * (1 - pure(hue)))``. Light, texture and
   shadow change value and saturation only; the hue stays within ``HUE_JITTER`` degrees of its
   category's centre, and centres are ``360 / 12 = 30`` degrees apart.
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int16, Num

from jointseg_jax.data.classes import Classes, Colour
from jointseg_jax.data.records import Record
from jointseg_jax.data.sources import scene_drawing

_STUFF_HUES = {"sky": 210.0, "hills": 270.0, "water": 180.0, "grass": 120.0, "sand": 30.0}
_THING_HUES = {
    **{"ball": 0.0, "star": 60.0, "triangle": 90.0, "cross": 150.0, "box": 240.0},
    **{"ring": 300.0, "heart": 330.0},
}
HUES = _STUFF_HUES | _THING_HUES
"""Hue centre of each category in degrees: stuff first, then things."""

HUE_JITTER = 5.0
"""Largest deviation of a region's hue from its centre; the oracle decides at 15 degrees."""

DIAMETERS = (0.1, 0.6)
"""Smallest and largest that a thing may be made, as a part of the shorter side."""

TILT = 0.6
"""Largest angle of a thing, in radians to either side."""

STUFF = tuple(_STUFF_HUES)
THINGS = tuple(_THING_HUES)
PLURALS = {name: name + ("es" if name.endswith(("x", "ss")) else "s") for name in THINGS}
_SINGULAR = {plural: name for name, plural in PLURALS.items()}
NUMBERS = ("no", "a", "two", "three", "four", "five", "six", "seven", "eight")
TEMPLATES = (
    "{things} on {ground} under {sky}",
    "{ground} with {things} below {sky}",
    "a picture of {things} on {ground} and {sky} above",
    "under {sky}, {ground} with {things}",
)
SPLITS = ("train", "val")
VERSION = 1
"""Raised whenever the same (seed, index) would give another picture."""


class Plan(NamedTuple):
    """A scene before rasterisation."""

    regions: tuple[scene_drawing.Region, ...]
    things: tuple[scene_drawing.Thing, ...]
    template: int


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Procedural pictures with label maps, instance ids and captions."""

    size: int | tuple[int, int] = 32  # side of the square, or (height, width), in pixels
    seed: int = 0
    count: int = 10**6  # virtual length; each index below it is another scene
    split: str = "train"
    things: tuple[str, ...] = THINGS  # categories that may appear on the ground
    max_things: int = 5
    thing_size: tuple[float, float] = (0.25, 0.5)
    """Smallest and largest bounding diameter, as a part of the shorter side."""
    texture: float = 1.0  # strength of the texture; 0 leaves light and shadow only

    def __post_init__(self) -> None:
        object.__setattr__(self, "things", tuple(self.things))
        object.__setattr__(self, "thing_size", tuple(self.thing_size))
        _check(self)

    @property
    def name(self) -> str:
        """Names the source."""
        return "scenes"

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (height, width)."""
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return height, width

    @property
    def classes(self) -> Classes:
        """Lists the categories, stuff first, coloured by their own hues."""
        names = STUFF + self.things
        isthing = tuple(name in THINGS for name in names)
        return Classes(names=names, isthing=isthing, palette=tuple(map(_colour, names)))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """Draws one scene."""
        index = operator.index(index)
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}: indices are 0..{self.count - 1}")
        plan = self.plan(index)
        image, layers = scene_drawing.draw(plan.regions, plan.things, self.shape, self.texture)
        kinds = [part.kind for part in (*plan.regions, *plan.things)]  # of each layer
        names = STUFF + self.things
        return Record(
            id=f"{self.split}-{self.seed}-{index:07d}",
            image=image,
            labels=np.array([names.index(kind) for kind in kinds], np.int16)[layers],
            captions=(_caption(kinds, layers, TEMPLATES[plan.template]),),
            # Layers count the regions first, then the things: those become instances 1, 2, ...
            segments=np.maximum(layers.astype(np.int32) - len(plan.regions) + 1, 0),
        )

    def plan(self, index: int) -> Plan:
        """Draws the geometry and the colours of a scene, without its pixels."""
        # Counter-based: a key for every scene, so any index costs the same, and splits never meet.
        key = (2 * self.seed + SPLITS.index(self.split), index)
        rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        template = int(rng.integers(len(TEMPLATES)))
        return Plan(self._regions(rng), self._things(rng), template)

    def words(self) -> tuple[str, ...]:
        """Lists every word its captions can contain, sorted."""
        fixed = " ".join(TEMPLATES).replace("{", " {").split()
        words = {word for word in fixed if not word.startswith("{")}
        words.update(STUFF, self.things, NUMBERS[1 : self.max_things + 1], ("and", "a"))
        if self.max_things > 1:
            words.update(PLURALS[name] for name in self.things)
        return tuple(sorted(words))

    def fingerprint(self) -> dict[str, object]:
        """Returns the plain values that must match when a run resumes."""
        fields = dataclasses.asdict(self) | {"size": self.shape}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"name": self.name, "version": VERSION, **plain}

    def oracle_labels(
        self, image: Num[np.ndarray, "*batch height width 3"]
    ) -> Int16[np.ndarray, "*batch height width"]:
        """Labels every pixel by its hue, for this source's own classes."""
        return oracle_labels(image, self.classes.names)

    def _regions(self, rng: np.random.Generator) -> tuple[scene_drawing.Region, ...]:
        """Chooses the sky and one or two kinds of ground, from top to bottom."""
        grounds = rng.permutation(4)[: int(rng.integers(1, 3))]
        names = ["sky", *sorted((STUFF[1 + g] for g in grounds), key=lambda n: n != "hills")]
        numbers = rng.random((len(names), 8))
        tops = (-1.0, 0.28 + 0.2 * numbers[0, 0], 0.6 + 0.16 * numbers[0, 1])
        return tuple(
            scene_drawing.Region(
                name,
                top=top,
                slant=0.16 * (u[2] - 0.5),
                hue=HUES[name] + HUE_JITTER * (2 * u[3] - 1),
                waves=1.0 + 1.5 * u[4],
                phase=u[5],
                light=u[6],
                offset=u[7],
            )
            for name, top, u in zip(names, tops, numbers)
        )

    def _things(self, rng: np.random.Generator) -> tuple[scene_drawing.Thing, ...]:
        """Chooses the things from back to front, each in the emptiest of a few places."""
        n = int(rng.integers(1, self.max_things + 1))
        kinds = rng.integers(len(self.things), size=n)
        numbers = rng.random((n, 8))
        positions = rng.random((n, 4, 2))
        smallest, largest = self.thing_size
        largest = smallest + (largest - smallest) * min(1.0, 2.2 / n)  # many things are small
        chosen: list[scene_drawing.Thing] = []
        for kind, u, candidates in zip(kinds, numbers, positions):
            # One in four things repeats the category of the one before, so that counts matter.
            again = chosen and u[0] < 0.25
            name = chosen[-1].kind if again else self.things[kind]
            radius = 0.5 * (smallest + (largest - smallest) * u[1])
            x, y = _emptiest(candidates, radius, chosen)
            thing = scene_drawing.Thing(
                name,
                hue=HUES[name] + HUE_JITTER * (2 * u[3] - 1),
                x=x,
                y=y,
                radius=radius,
                angle=2 * TILT * (u[2] - 0.5),
                light=u[4],
                pattern=int(u[5] * len(scene_drawing.PATTERNS)),
                phase=u[6],
                pitch=u[7],
            )
            chosen.append(thing)
        return tuple(chosen)


def oracle_labels(
    image: Num[np.ndarray, "*batch height width 3"], names: tuple[str, ...] = tuple(HUES)
) -> Int16[np.ndarray, "*batch height width"]:
    """Labels every pixel with the category of the nearest hue (grey pixels with the first).

    Any affine scaling of the colours gives the same labels: uint8, 0..1 or -1..1.
    """
    # RGB projected on the direction of each hue, orthogonal to grey, is chroma * cos(hue - centre):
    # its largest entry is the nearest hue.
    angles = np.deg2rad([HUES[name] for name in names])[None, :]
    red_green_blue = np.deg2rad([[0.0], [120.0], [240.0]])
    directions = np.cos(angles - red_green_blue).astype(np.float32)
    return np.argmax(image.astype(np.float32) @ directions, axis=-1).astype(np.int16)


def _colour(name: str) -> Colour:
    colour = np.round(255 * scene_drawing.flat_colour(HUES[name], name in THINGS))
    return int(colour[0]), int(colour[1]), int(colour[2])


def _emptiest(
    positions: np.ndarray, radius: float, chosen: Sequence[scene_drawing.Thing]
) -> tuple[float, float]:
    """Returns the position, inside the picture, that keeps most distance from the others."""
    low = max(radius, 0.2)  # below the sky
    x = radius + (1.0 - 2.0 * radius) * positions[:, 0]
    y = low + (1.0 - radius - low) * positions[:, 1]
    if not chosen:
        return float(x[0]), float(y[0])
    gaps = [np.hypot(x - t.x, y - t.y) / (radius + t.radius) for t in chosen]
    best = int(np.argmax(np.min(gaps, axis=0)))
    return float(x[best]), float(y[best])


def _caption(kinds: list[str], layers: Int8[np.ndarray, "height width"], template: str) -> str:
    """Names the kinds of the layers that have at least one pixel, the largest first."""
    area, number = Counter(), Counter()
    # Counted in the picture, not in the plan: what lies behind another thing is not there.
    for kind, n in zip(kinds, np.bincount(layers.ravel(), minlength=len(kinds)).tolist()):
        if n:
            area[kind] += n
            number[kind] += 1
    ordered = sorted(area, key=lambda kind: (-area[kind], kind))
    things = [
        f"{NUMBERS[number[kind]]} {kind if number[kind] == 1 else PLURALS[kind]}"
        for kind in ordered
        if kind in THINGS
    ]
    ground = [kind for kind in ordered if kind in STUFF and kind != "sky"]
    return template.format(things=_listed(things), ground=_listed(ground), sky="a sky")


def named(caption: str) -> dict[str, int]:
    """Returns how many of each category a caption names, the inverse of ``_caption``.

    A thing without a number is one; stuff that is named counts 1.
    """
    found: Counter[str] = Counter()
    words = caption.lower().replace(",", " ").split()
    for before, word in zip(["", *words], words):
        kind = _SINGULAR.get(word, word)
        if kind in THINGS:
            found[kind] += NUMBERS.index(before) if before in NUMBERS else 1
        elif kind in STUFF:
            found[kind] = 1
    return dict(found)


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def _check(scenes: Scenes) -> None:
    """Raises ValueError when the knobs cannot give scenes."""
    (low, high), things, side = scenes.thing_size, scenes.things, min(scenes.shape)
    if side < 8:
        wrong = f"size is {scenes.size}; give a side, or (height, width), >= 8"
    elif scenes.split not in SPLITS:
        wrong = f"split is {scenes.split!r}; choose one of {', '.join(SPLITS)}"
    elif not 0 <= scenes.seed < 2**62 or not 1 <= scenes.count <= 2**62:
        ranges = "give a seed in 0..2^62 and a count of at least 1"
        wrong = f"seed is {scenes.seed} and count {scenes.count}; {ranges}"
    elif not set(things) <= set(THINGS) or not len(set(things)) == len(things) > 0:
        wrong = f"things is {things}; give different names out of {', '.join(THINGS)}"
    elif not 1 <= scenes.max_things < len(NUMBERS):
        wrong = f"max_things is {scenes.max_things}; give 1 to {len(NUMBERS) - 1}"
    elif not DIAMETERS[0] <= low <= high <= DIAMETERS[1] or scenes.texture < 0:
        ranges = "sizes need {} <= smallest <= largest <= {}, texture must not be negative"
        ranges = ranges.format(*DIAMETERS)
        wrong = f"thing_size is {scenes.thing_size} and texture {scenes.texture}; {ranges}"
    elif low * side < 4:
        remedy = "a thing needs at least 4 pixels: enlarge the picture or the thing_size"
        wrong = f"size is {scenes.size} and the smallest thing {low} of it; {remedy}"
    else:
        return
    raise ValueError(f"Scenes.{wrong}")
