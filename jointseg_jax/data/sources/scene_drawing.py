"""Rasterises a scene: regions from top to bottom, then things from back to front.

1. ``pure(h)`` is the RGB colour of hue h at full saturation and value.
2. Each part of a scene is one *layer* with one hue; each pixel has one layer, a value v and a
   saturation s, and becomes ``v * (1 - s * (1 - pure(hue of its layer)))``.
3. A thing is ``level(u, v) > 0`` in its own turned and scaled frame, where it fits the unit disc.
   ``level`` grows inwards, which gives the dark rim its place.

Pixel centres are at ``(i + 0.5) / n``; only a thing's own window of pixels is computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, UInt8

LIGHT = (-0.5, -0.8)
"""Direction towards the light, x to the right and y downwards: the upper left."""

LOWEST_CHROMA = 0.2
"""Every pixel keeps at least this ``value * saturation``, so that its hue can be read."""

Map = np.ndarray
"""A scalar field over pixels, float; x is [1, width], y is [height, 1]."""

Ground = tuple[Map, Map]
"""Value and saturation."""


class Canvas(NamedTuple):
    """The picture being painted, in place."""

    layers: np.ndarray  # int8 [height, width]
    value: Map  # float32 [height, width]
    saturation: Map


class Region(NamedTuple):
    """A kind of ground from its upper edge down to the next one."""

    kind: str
    hue: float  # in degrees
    top: float  # height of the upper edge in its middle
    slant: float  # of the edge, from side to side
    waves: float  # of the edge, across the picture
    phase: float  # of those waves, in turns
    light: float  # 0 .. 1
    offset: float  # of the texture, in turns


class Thing(NamedTuple):
    """A shape at (x, y), its bounding circle of ``radius`` times the shorter side."""

    kind: str
    hue: float  # in degrees
    x: float
    y: float
    radius: float
    angle: float  # in radians
    light: float  # 0 .. 1
    pattern: int  # index of ``PATTERNS``
    phase: float  # of the pattern, in turns
    pitch: float  # of the pattern, 0 .. 1


def pure(hue: float) -> np.ndarray:
    """Returns the RGB colour (0..1) of a hue in degrees at full saturation and value."""
    k = np.mod(np.array([5.0, 3.0, 1.0]) + hue / 60.0, 6.0)
    return 1.0 - np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)


def flat_colour(hue: float, thing: bool) -> np.ndarray:
    """Returns the typical RGB colour (0..1) of a category, for legends and label maps."""
    value, saturation = (0.95, 0.85) if thing else (0.85, 0.55)
    return value * (1.0 - saturation * (1.0 - pure(hue)))


# --- shapes: level(u, v) > 0 inside, in a frame where the shape fits the unit disc (v down) ---


def _star(u: Map, v: Map) -> Map:
    radius = np.sqrt(u * u + v * v)
    fold = np.abs(np.mod(np.arctan2(u, -v) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    # The edge from the tip (1, 0) to the inner corner at angle pi/5 and radius 0.48.
    return 1.0 - radius * (np.cos(fold) + 2.168 * np.sin(fold))


def _cross(u: Map, v: Map) -> Map:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(0.34 - np.minimum(u, v), 0.92 - np.maximum(u, v)) / 0.34


def _heart(u: Map, v: Map) -> Map:
    x, y = 1.2 * u, 0.22 - 1.2 * v
    return 1.2 * (1.0 - np.hypot(x, 1.1 * (y - 0.55 * np.sqrt(np.abs(x)))))


SHAPES: dict[str, Callable[[Map, Map], Map]] = {
    "ball": lambda u, v: 1.0 - (u * u + v * v),
    "star": _star,
    "triangle": lambda u, v: 1.0 - 2.0 * np.maximum(v, 0.866 * np.abs(u) - 0.5 * v),
    "cross": _cross,
    "box": lambda u, v: 1.0 - np.maximum(np.abs(u), np.abs(v)) / 0.72,
    "ring": lambda u, v: 1.0 - np.square((np.sqrt(u * u + v * v) - 0.69) / 0.31),
    "heart": _heart,
}


def turned(dx: Map, dy: Map, angle: float | Map) -> tuple[Map, Map]:
    """Returns the own frame (u, v) of a thing, turned by an angle in radians.

    Args:
      dx: offsets from its centre in units of its radius, to the right; ``dy`` downwards.
    """
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * dx + sin * dy, cos * dy - sin * dx


# --- textures of things, in their own frame: -1 .. 1 ---


def _dots(u: Map, v: Map, phase: float, pitch: float) -> Map:
    pitch = 6.0 + 4.0 * pitch
    dots = np.cos(pitch * u + 6.28 * phase) * np.cos(pitch * v)
    return np.clip(4.0 * dots - 1.4, -0.4, 1.0)


PATTERNS: tuple[Callable[[Map, Map, float, float], Map], ...] = (
    lambda u, v, phase, pitch: np.zeros_like(u),  # plain
    lambda u, v, phase, pitch: np.sin((6.0 + 5.0 * pitch) * (u + 0.25 * v) + 6.28 * phase),
    _dots,
    lambda u, v, phase, pitch: np.cos(np.sqrt(u * u + v * v) * (9.0 + 5.0 * pitch) + 6.28 * phase),
)

GRAIN = np.random.Generator(np.random.Philox(key=7)).random((128, 128), np.float32) * 2 - 1
"""Fine noise of the ground, in -1 .. 1; a scene reads it at its own offset."""


def draw(
    regions: tuple[Region, ...], things: tuple[Thing, ...], shape: tuple[int, int], texture: float
) -> tuple[UInt8[np.ndarray, "height width 3"], Int8[np.ndarray, "height width"]]:
    """Returns the picture and, for every pixel, the number of its layer (regions, then things)."""
    height, width = shape
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None, :]
    value, saturation = np.empty(shape, np.float32), np.empty(shape, np.float32)
    canvas = Canvas(layers := np.zeros(shape, np.int8), value, saturation)
    for i, region in enumerate(regions):
        _paint_region(region, i, x, y, texture, canvas)
    for i, thing in enumerate(things):
        _paint_thing(thing, len(regions) + i, x, y, texture, canvas)
    white = np.array([1.0 - pure(part.hue) for part in (*regions, *things)], np.float32)[layers]
    # A pale or dark pixel is made more saturated, until its hue can be read.
    np.maximum(saturation, LOWEST_CHROMA / np.maximum(value, LOWEST_CHROMA), out=saturation)
    np.minimum(saturation, 1.0, out=saturation)
    # v (1 - s (1 - pure(hue))), rounded, in place: this is most of the time of a scene
    white *= saturation[..., None]
    np.subtract(1.0, white, out=white)
    white *= (255.0 * np.clip(value, 0.3, 1.0))[..., None]
    white += 0.5
    return white.astype(np.uint8), layers


def _edge(region: Region, x: Map) -> Map:
    """Returns the upper border of a region over x: slanted and wavy, or a row of hilltops."""
    turn = 6.2832 * (region.waves * x + region.phase)
    line = region.top + region.slant * (x - 0.5)
    if region.kind == "hills":
        return line - 0.13 * np.abs(np.sin(turn)) - 0.05 * np.abs(np.sin(1.7 * turn + 2.0)) + 0.08
    return line + 0.025 * np.sin(turn) + 0.012 * np.sin(2.3 * turn + 1.0)


def _paint_region(
    region: Region, layer: int, x: Map, y: Map, texture: float, canvas: Canvas
) -> None:
    """Paints a region from its upper edge down to the bottom of the picture."""
    layers, value, saturation = canvas
    depth, turn = y - _edge(region, x), 6.2832 * region.offset
    v, s = _GROUNDS[region.kind](x, y, depth, turn, texture, _grain(region, x, y))
    inside = depth > 0
    np.copyto(value, v + 0.1 * (region.light - 0.5), where=inside)
    np.copyto(saturation, s, where=inside)
    layers[inside] = layer


def _sky(x: Map, y: Map, depth: Map, turn: float, texture: float, grain: Map) -> Ground:
    cloud = np.sin(5.0 * x + 9.0 * y + turn) + np.sin(11.0 * x - 16.0 * y + 2.0 * turn)
    cloud = np.maximum(texture * 0.08 * cloud, 0.0)
    return 0.92 + 0.3 * cloud, 0.8 - 0.4 * y - cloud


def _hills(x: Map, y: Map, depth: Map, turn: float, texture: float, grain: Map) -> Ground:
    slope = np.sin(16.0 * x + 13.0 * y + turn)
    return 0.68 + 0.35 * depth + texture * (0.05 * slope + 0.03 * grain), 0.64 - 0.2 * depth


def _water(x: Map, y: Map, depth: Map, turn: float, texture: float, grain: Map) -> Ground:
    ripple = np.sin(6.2832 * (11.0 * y + 0.35 * np.sin(9.0 * x + turn)) + 4.0 * x)
    return 0.85 - 0.25 * depth + texture * 0.05 * ripple, 0.72 + 0.2 * depth


def _grass(x: Map, y: Map, depth: Map, turn: float, texture: float, grain: Map) -> Ground:
    blades = np.sin(50.0 * x + 3.0 * np.sin(17.0 * y + turn) + 8.0 * y)
    return 0.78 - 0.25 * depth + texture * (0.04 * blades + 0.08 * grain), 0.72 + 0.1 * depth


def _sand(x: Map, y: Map, depth: Map, turn: float, texture: float, grain: Map) -> Ground:
    dune = np.sin(6.2832 * (3.0 * y + 1.2 * x) + 2.0 * np.sin(5.0 * x + turn))
    return 0.96 - 0.12 * depth + texture * (0.03 * dune + 0.05 * grain), 0.6 + 0.1 * depth


_GROUNDS = {"sky": _sky, "hills": _hills, "water": _water, "grass": _grass, "sand": _sand}


def _grain(region: Region, x: Map, y: Map) -> Map:
    """Reads the fine noise, weakened as averaging over a large pixel would weaken it."""
    rows = ((y[:, 0] + region.offset) * 128).astype(int) % 128
    columns = ((x[0] + region.phase) * 128).astype(int) % 128
    return GRAIN[rows[:, None], columns] * min(1.0, len(rows) / 128.0)


def _paint_thing(thing: Thing, layer: int, x: Map, y: Map, texture: float, canvas: Canvas) -> None:
    """Paints a thing over what lies behind it, and its shadow."""
    layers, value, saturation = canvas
    height, width = layers.shape
    side = min(height, width)
    rows = _window(thing.y, thing.radius * side / height, height)
    columns = _window(thing.x, thing.radius * side / width, width)
    dx = (x[:, columns] - thing.x) * (width / (side * thing.radius))
    dy = (y[rows] - thing.y) * (height / (side * thing.radius))
    u, v = turned(dx, dy, thing.angle)
    level = SHAPES[thing.kind](u, v)
    inside = level > 0
    _shade(inside, rows, columns, round(0.022 * side), value)
    # light: brighter towards it, dark at the rim, and a highlight that is pale
    glow = LIGHT[0] * dx + LIGHT[1] * dy
    rim = np.minimum(level * (thing.radius * 18.0), 1.0)
    pattern = texture * PATTERNS[thing.pattern](u, v, thing.phase, thing.pitch)
    lit = (0.86 + 0.1 * thing.light) * (0.72 + 0.28 * rim) * (1.0 + 0.2 * glow + 0.1 * pattern)
    shine = np.maximum(1.0 - 5.0 * (np.square(dx + 0.32) + np.square(dy + 0.42)), 0.0)
    np.copyto(value[rows, columns], lit + 0.15 * shine, where=inside)
    np.copyto(saturation[rows, columns], 0.92 - 0.4 * shine - 0.08 * pattern, where=inside)
    layers[rows, columns][inside] = layer


def _window(centre: float, radius: float, n: int) -> slice:
    """Returns the pixels whose centres can lie within the radius."""
    return slice(max(int((centre - radius) * n), 0), min(int((centre + radius) * n) + 1, n))


def _shade(inside: np.ndarray, rows: slice, columns: slice, step: int, value: Map) -> None:
    """Darkens what lies to the lower right of a shape by the same shape, shifted."""
    below = value[rows.start + step : rows.stop + step, columns.start + step : columns.stop + step]
    below[inside[: below.shape[0], : below.shape[1]]] *= 0.72
