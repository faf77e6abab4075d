"""Label maps as colours: a pixel's class is a point of the RGB cube, in the image's own space.

Grey levels 0 .. 255 and latents are related by x = level / 127.5 - 1.

1. lattice: class c has the colour s (c // K^2, (c // K) mod K, c mod K): its K-ary digits, spaced
   by s.
2. kronecker: the points (1/2 + c (1/p, 1/p^2, 1/p^3)) mod 1, p^4 = p + 1, stretched to 0 .. 254 in
   every channel and rounded: all three channels vary whatever the number of classes.
3. perturbation: e ~ U(-beta, beta), independent per pixel and channel, added without clamping.
4. Reading is exact if beta < reach = min over pairs of colours d apart of |d|^2 / (2 |d|_1).
   Proof: with a_j = a_i + d, |a_i + e - a_j|^2 - |e|^2 = |d|^2 - 2 d.e >= |d|^2 - 2 beta |d|_1,
   which is positive for every j if and only if beta < reach; e = beta sign(d) attains it. QED
   On the lattice |d_channel| >= s wherever it is not 0, so |d|^2 >= s |d|_1 and reach = s / 2
   (classes 0 and 1 attain it). In general |d|_1 <= sqrt(3) |d|, so that the smallest distance D
   gives reach >= D / (2 sqrt(3)); the value used is the exact one of the rounded colours.
5. Nearest lattice colour: q = clip(round(level / s), 0, K - 1) per channel, if that is a class.
   The argmin over all classes and its runner-up are exact with memory of the order of the pixels
   (``_boxes``). Kronecker colours are visited one after the other, with the same memory.
6. confidence = min(1, margin / D^2) with margin = |x - a_2nd|^2 - |x - a_1st|^2: 1 at any colour, 0
   half way between two.

Source: SemFlow (2405.20282), eq. 7 and 14, section 3.3 (``build_palette``, ``pert.co``); Roberts,
"The unreasonable effectiveness of quasirandom sequences" (R3).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from jointseg_jax.codecs.codec import Confidence, Fixed, Keys, Kind, LabelMaps, Labels, Reading
from jointseg_jax.codecs.pixels import normalise
from jointseg_jax.rng import uniform
from jointseg_jax.types import VOID, AnyArray, Array, ArrayT, Params

AnyColours = Float[AnyArray, "batch height width 3"]
Colours = Float[Array, "batch height width 3"]

BRIGHTEST = 254
"""The largest level of a fitted colour, so that none is white."""

WHITE = 255


@dataclass(frozen=True, kw_only=True)
class Palette(Fixed):
    """Labels as colours in [-1, 1]."""

    classes: int
    table: Literal["lattice", "kronecker"] = "lattice"
    k: int | None = None  # levels per channel of the lattice; None: ceil(classes^(1/3))
    s: int | None = None  # grey levels between them; None: floor(254 / (k - 1)). Published: 6, 50
    void: Literal["white", "masked"] = "white"
    """What VOID pixels become: white, which the model learns to emit, or mid grey, whatever
    surrounds them, which the system leaves out of its loss."""
    decode_void: bool = False  # white is read back as VOID; else every pixel as a class
    perturbation: float = 0.0
    """beta in grey levels, where ``encode`` is given keys (published: 6, in its code 6.375)."""
    kind: ClassVar[Kind] = "labels"

    def __post_init__(self) -> None:
        tables, voids = ("lattice", "kronecker"), ("white", "masked")
        _require("table", repr(self.table), self.table in tables, "one of 'lattice', 'kronecker'")
        _require("void", repr(self.void), self.void in voids, "one of 'white', 'masked'")
        _require("classes", self.classes, self.classes >= 1, "at least 1")
        if self.table == "lattice":
            k, s = self.levels, self.spacing
            large = k >= 1 and k**3 >= self.classes
            _require("k", k, large, f"so large that k^3 >= {self.classes}")
            # Below white, so that VOID has a colour of its own.
            fits = s >= 1 and s * (k - 1) < WHITE
            _require("s", s, fits, f"at least 1 with s (k - 1) < 255, k = {k}")
        else:
            own = (self.k, self.s)
            _require("(k, s)", own, own == (None, None), 'left out with table = "kronecker"')
            few = self.classes <= 4096
            _require("classes", self.classes, few, "at most 4096 Kronecker codes")
        white = self.void == "white" or not self.decode_void
        _require("decode_void", self.decode_void, white, 'False with void = "masked"')
        self._check_perturbation()

    def _check_perturbation(self) -> None:
        beta, reach = self.perturbation, self.reach
        if 0 <= beta < reach:
            return
        spacing = self.table == "lattice" and not self.decode_void
        why = "s/2, half the spacing of the colours" if spacing else "the reach of these colours"
        more = ", or `decode_void`" if self.decode_void else ""
        raise ValueError(
            f"palette codec: perturbation = {beta:g} grey levels was given; it must be at least 0 "
            f"and less than {reach:g} = {why}: beyond it a perturbed colour can be nearer to "
            "another class than to its own. Lower `perturbation`, or choose colours farther apart "
            f"(`table`, `k`, `s`{more}), in the codec config."
        )

    @property
    def levels(self) -> int:
        """K, the levels of each channel of the lattice."""
        if self.k is not None:
            return self.k
        return next(k for k in range(1, self.classes + 1) if k**3 >= self.classes)

    @property
    def spacing(self) -> int:
        """s, the grey levels from one lattice colour to the next."""
        return BRIGHTEST // max(self.levels - 1, 1) if self.s is None else self.s

    @cached_property
    def reach(self) -> float:
        """The perturbation, in grey levels, below which every colour is read back as itself."""
        # (4) |d|^2 / (2 |d|_1)
        near = (np.square(d).sum(-1) / (2.0 * np.abs(d).sum(-1)) for d in self._differences())
        return min((float(n.min()) for n in near), default=WHITE / 2)

    @cached_property
    def gap(self) -> float:
        """D, the smallest distance between two colours, in units of latents."""
        near = (np.square(d).sum(-1) for d in self._differences())
        return min((float(n.min()) for n in near), default=WHITE**2) ** 0.5 / 127.5

    def _differences(self) -> list[np.ndarray]:
        """Every difference of two colours that can be read, row by row."""
        levels = self._levels_read.astype(np.int64)  # uint8 would wrap
        if self.table == "lattice":
            # Classes 0 and 1 are s apart, and by (4) no pair is nearer: they stand for all.
            pairs = levels[1:2] - levels[:1] if self.classes > 1 else levels[:0]
            white = levels[-1:] - levels[:-1] if self.decode_void else levels[:0]
            return [d for d in (pairs, white) if len(d)]
        return [levels[i + 1 :] - levels[i] for i in range(len(levels) - 1)]

    def colours(self) -> UInt8[np.ndarray, "classes 3"]:
        """The colour of every class, in grey levels."""
        ids = np.arange(self.classes).reshape(-1, 1)
        if self.table == "lattice":
            # (1) s (c // K^2, (c // K) mod K, c mod K)
            return (self.spacing * (ids // self._place_values % self.levels)).astype(np.uint8)
        return _kronecker(ids)

    @property
    def _place_values(self) -> np.ndarray:
        return np.array([[self.levels**2, self.levels, 1]])

    @cached_property
    def _levels_read(self) -> np.ndarray:
        """Levels of what ``decode`` may find: the classes, then white if VOID is read."""
        white = np.full((int(self.decode_void), 3), WHITE, np.uint8)
        return np.concatenate([self.colours(), white])

    @cached_property
    def _levels_written(self) -> np.ndarray:
        """Latents of the classes, then of VOID."""
        void = np.full((1, 3), 1.0 if self.void == "white" else 0.0, np.float32)
        return np.concatenate([normalise(self.colours()), void])

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """A colour per pixel."""
        return (*size, 3)

    def encode(self, params: Params, labels: LabelMaps, *, keys: Keys | None = None) -> Colours:
        """The colours, perturbed where keys are given; NaN for ids that are no class."""
        labels = jnp.asarray(labels, jnp.int32)
        # VOID is the table's last row; other ids lie beyond it and are filled with NaN.
        beyond = jnp.where(labels == VOID, self.classes, self.classes + 1)
        index = jnp.where((labels >= 0) & (labels < self.classes), labels, beyond)
        table = jnp.asarray(self._levels_written)  # [classes + 1, 3]
        colours = table.at[index].get(mode="fill", fill_value=jnp.nan)
        if keys is None or self.perturbation == 0:
            return colours
        uniforms = uniform(keys, colours.shape[1:])  # [b, h, w, 3], a row from its own key
        return self.perturb(colours, uniforms)

    def perturb(
        self, colours: Float[ArrayT, "b h w 3"], uniforms: Float[ArrayT, "b h w 3"]
    ) -> Float[ArrayT, "b h w 3"]:
        """The colours moved by ``perturbation (2 u - 1)`` grey levels."""
        amplitude = np.float32(self.perturbation / 127.5)
        return colours + amplitude * (2 * uniforms - 1)

    def decode(self, params: Params, latents: AnyColours) -> Labels:
        """The class of the nearest colour, the smaller id of equals."""
        return self._labels(self._nearest(jnp.asarray(latents, jnp.float32))[0])

    def decode_with_confidence(self, params: Params, latents: AnyColours) -> Reading:
        """The class of the nearest colour, and min(1, margin / D^2)."""
        x = jnp.asarray(latents, jnp.float32)
        first, second = self._nearest(x)
        confidence = jnp.nan_to_num(self._margin(x, first, second) / self.gap**2)
        return self._labels(first), jnp.clip(confidence, 0, 1)

    def margin(self, latents: AnyColours) -> Confidence:
        """How much farther, in squares, the second nearest colour is than the nearest.

        Infinite where there is only one colour.
        """
        x = jnp.asarray(latents, jnp.float32)
        return self._margin(x, *self._nearest(x))

    def _margin(self, x: Array, first: Array, second: Array) -> Array:
        colours = jnp.asarray(normalise(self._levels_read))
        if len(colours) == 1:
            return jnp.full(x.shape[:-1], jnp.inf)
        a, b = colours[first], colours[second]  # [b, h, w, 3]
        # |x - b|^2 - |x - a|^2 = sum (a - b)(2 x - a - b): no difference of two large squares
        return ((a - b) * (2 * x - a - b)).sum(-1)

    def _labels(self, index: Array) -> Array:
        return jnp.where(index == self.classes, VOID, index)

    def _nearest(self, x: Array) -> tuple[Array, Array]:
        """Indices into ``_levels_read`` of the two colours nearest to each pixel."""
        if self.table == "kronecker":
            return _visit(x, normalise(self._levels_read))
        # In spacings: a lattice colour's coordinates are its digits.
        u = (x + 1) * (127.5 / self.spacing)
        u = jnp.where(jnp.isnan(u), 0, u)  # some class, and confidence 0
        # The two nearest of every box; the two nearest of all are among them.
        candidates = [pair for box in self._boxes for pair in self._in_box(u, *box)]
        if self.decode_void:
            far = jnp.square(u - WHITE / self.spacing).sum(-1)
            candidates.append((jnp.full(far.shape, self.classes, jnp.int32), far))
        ids, distances = (jnp.stack(parts) for parts in zip(*candidates))  # [candidates, b, h, w]
        best = jnp.argmin(distances, axis=0, keepdims=True)
        rows = jnp.arange(len(candidates)).reshape(-1, 1, 1, 1)
        others = jnp.where(rows == best, jnp.inf, distances)
        next_best = jnp.argmin(others, axis=0, keepdims=True)
        first, second = (jnp.take_along_axis(ids, i, axis=0)[0] for i in (best, next_best))
        return first, second

    @property
    def _boxes(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Smallest and largest digits of the boxes whose union is the classes.

        The classes are the digit triples up to that of classes - 1 = (m0, m1, m2) in lexicographic
        order: [q0 < m0], [q0 = m0, q1 < m1] and [q0 = m0, q1 = m1, q2 <= m2].
        """
        last, top = (self.classes - 1) // self._place_values[0] % self.levels, self.levels - 1
        boxes = [((*last[:2], 0), last)]
        if last[1]:
            boxes.insert(0, ((last[0], 0, 0), (last[0], last[1] - 1, top)))
        if last[0]:
            boxes.insert(0, ((0, 0, 0), (last[0] - 1, top, top)))
        shape = (1, 1, 1, 3)  # against [b, h, w, 3]
        return [(np.reshape(low, shape), np.reshape(high, shape)) for low, high in boxes]

    def _in_box(
        self, u: Array, low: np.ndarray, high: np.ndarray
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Index and squared distance, in spacings, of the two lattice points nearest to ``u``."""
        # (5) q = clip(round(level / s)); halves round down: of equals the smaller digit is nearest
        near = jnp.clip(jnp.ceil(u - 0.5), low, high)
        # The second nearest is one step away in one channel, towards u if that stays in the box.
        step = jnp.where(u > near, 1, -1)
        step = jnp.where(near + step > high, -1, jnp.where(near + step < low, 1, step))
        # (near + step - u)^2 - (near - u)^2, in each channel
        cost = 1 - 2 * step * (u - near)
        cost = jnp.where(low == high, jnp.inf, cost)
        cheapest = jnp.arange(3).reshape(1, 1, 1, 3) == jnp.argmin(cost, -1, keepdims=True)
        values = jnp.asarray(self._place_values, jnp.int32).reshape(1, 1, 1, 3)
        index = (near.astype(jnp.int32) * values).sum(-1)
        next_index = index + (cheapest * step * values).sum(-1)
        distance = jnp.square(u - near).sum(-1)
        return (index, distance), (next_index, distance + cost.min(-1))


def _visit(x: Array, colours: np.ndarray) -> tuple[Array, Array]:
    """The indices of the nearest and second nearest colours, looking at one at a time."""

    def look(best: tuple[Array, ...], item: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        first, second, least, less = best  # [b, h, w]: two ids and their distances
        index, colour = item
        distance = jnp.square(x - colour.reshape(1, 1, 1, 3)).sum(-1)
        wins, follows = distance < least, distance < less
        second = jnp.where(wins, first, jnp.where(follows, index, second))
        less = jnp.where(wins, least, jnp.where(follows, distance, less))
        first, least = jnp.where(wins, index, first), jnp.where(wins, distance, least)
        return (first, second, least, less), None

    # A scan, for memory of the order of the pixels: all distances at once are [b, h, w, classes].
    unset, far = jnp.zeros(x.shape[:-1], jnp.int32), jnp.full(x.shape[:-1], jnp.inf)
    items = jnp.arange(len(colours), dtype=jnp.int32), jnp.asarray(colours)
    (first, second, _, _), _ = jax.lax.scan(look, (unset, unset, far, far), items)
    return first, second


def _kronecker(ids: np.ndarray) -> np.ndarray:
    """Rounded points of the R3 sequence, stretched to the whole cube."""
    root = 1.22074408460575947536  # p^4 = p + 1
    points = (0.5 + ids * root ** -np.arange(1.0, 4.0).reshape(1, 3)) % 1
    low, high = points.min(0, keepdims=True), points.max(0, keepdims=True)
    return np.round(BRIGHTEST * (points - low) / np.maximum(high - low, 1e-9)).astype(np.uint8)


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(
            f"palette codec: {name} = {value} was given; it must be {rule}. "
            f"Change `{name}` in the codec config."
        )
