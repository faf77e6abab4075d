"""Bicubic resampling of RGB images: one result, by Pillow or, over twice as fast, by numba.

1. Output ``i`` has its centre at ``c_i = low + (i + 1/2) s``, ``s`` source pixels an output pixel;
   source pixel ``j`` has the weight ``k((j + 1/2 - c_i) / max(s, 1))``, cubic with ``a = -1/2``.
   The weights of an output sum to 1 and are rounded to 22 fractional bits.
2. ``out_i = clip(round(sum_j w_ij in_j))``, across first, then down, with 8 bits in between.
"""

import functools
import inspect
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

BITS = 22
HALF = 1 << (BITS - 1)
SQUARE = 8
MASKS = (
    np.array([0x00000000FFFFFFFF, 0x0000FFFF0000FFFF, 0x00FF00FF00FF00FF], np.uint64),
    np.array([32, 16, 8], np.uint64),
)
"""The first halves of a word's bytes in each trade of ``turn_squares``, and the bits they move."""

WORTH = 1 << 15
"""Pixels of the output from which on loading compiled code is worth it."""

Box = tuple[float, float, float, float]  # top, left, height, width in source pixels
Edges = tuple[float, float]
Pixels = UInt8[np.ndarray, "height width 3"]
Made = UInt8[np.ndarray, "tall wide 3"]


def resample(image: Pixels, target: tuple[int, int], box: Box) -> Made:
    """Resamples a box of an image to the size ``target``."""
    rows, down = _reach(box[0], box[2], target[0], image.shape[0])
    columns, across = _reach(box[1], box[3], target[1], image.shape[1])
    part = image[rows, columns]
    passes = compiled() if target[0] * target[1] >= WORTH else None
    if passes is None:
        return by_pillow(part, target, down, across)
    return by_rows(part, target, down, across, *passes)


def _reach(start: float, span: float, count: int, length: int) -> tuple[slice, Edges]:
    """Returns the source pixels that a span is made from, and its edges in them."""
    end = min(start + span, float(length))  # rounding may have pushed it past the edge
    # The cubic kernel reaches 2 pixels, of the output where the image shrinks.
    margin = math.ceil(2 * max(span / count, 1.0)) + 1
    first, last = max(math.floor(start) - margin, 0), min(math.ceil(end) + margin, length)
    return slice(first, last), (start - first, end - first)


def by_pillow(image: Pixels, target: tuple[int, int], down: Edges, across: Edges) -> Made:
    """Resamples across, then down, by Pillow."""
    # One pass at a time: asked for both, Pillow goes down first when its version thinks that this
    # is less work, and its versions do not agree.
    height, (top, bottom), (left, right) = image.shape[0], down, across
    bicubic, picture = Image.Resampling.BICUBIC, Image.fromarray(np.ascontiguousarray(image))
    picture = picture.resize((target[1], height), bicubic, box=(left, 0, right, height))
    return np.array(
        picture.resize((target[1], target[0]), bicubic, box=(0, top, target[1], bottom))
    )


def by_rows(
    image: Pixels,
    target: tuple[int, int],
    down: Edges,
    across: Edges,
    turn: Callable,
    weigh: Callable,
) -> Made:
    """Resamples across, then down, by ``turn_squares`` and ``weigh_rows``, compiled or not."""
    (height, width), (tall, wide) = image.shape[:2], target
    high = whole(height)
    padded = np.empty((high, whole(width * 3)), np.uint8)  # what lies in the margins is never used
    padded[:, : width * 3].reshape(high, width, 3)[:height] = image
    # Across: whole rows, which a compiler makes vectors of, of the turned image. Its sides are
    # padded so that it is turned in squares of eight by eight.
    turned = turned_by(turn, padded)[: width * 3]
    narrow = np.empty((whole(wide * 3), high), np.uint8)
    rows = narrow[: wide * 3].reshape(wide, 3 * high)
    weigh(turned.reshape(width, 3 * high), *taps(width, *across, wide), rows)
    # Down: turned back, the same pass over its own rows.
    out = np.empty((tall, len(narrow)), np.uint8)
    weigh(turned_by(turn, narrow)[:height], *taps(height, *down, tall), out)
    return np.ascontiguousarray(out[:, : wide * 3]).reshape(tall, wide, 3)


def whole(count: int) -> int:
    """Returns the next multiple of a square's side."""
    return -(-count // SQUARE) * SQUARE


def turned_by(turn: Callable, pixels: UInt8[np.ndarray, "m n"]) -> UInt8[np.ndarray, "n m"]:
    """Returns the transpose of a map whose sides are whole squares, by ``turn_squares``."""
    height, width = pixels.shape
    out = np.empty((width, height), np.uint8)
    turn(pixels.view(np.uint64), out.view(np.uint64), *MASKS)
    return out


@functools.lru_cache(256)
def taps(length: int, low: float, high: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first source pixel of each output, and the weights from there on (22 bits)."""
    # Edges and their difference in float32, as Pillow takes them.
    begin, end = np.float32(low), np.float32(high)
    scale = float(end - begin) / count
    wide = max(scale, 1.0)
    centres = float(begin) + (np.arange(count) + 0.5) * scale
    first = np.maximum((centres - 2.0 * wide + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + 2.0 * wide + 0.5).astype(np.int64), length)
    most = int((last - first).max())
    start = np.minimum(first, length - most)  # so that ``most`` pixels follow
    pixels = start[:, None] + np.arange(most)
    weights = cubic((pixels - centres[:, None] + 0.5) * (1.0 / wide))
    weights = np.where((pixels >= first[:, None]) & (pixels < last[:, None]), weights, 0.0)
    total = np.zeros(count)
    for column in weights.T:  # one after the other, as Pillow adds them
        total = total + column
    # Fixed point with 22 fractional bits, rounded away from zero.
    scaled = weights * (1.0 / total)[:, None] * (1 << BITS)
    return start, np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int32)


def cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with ``a = -1/2`` (Keys 1981), 0 from |x| = 2 on."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def turn_squares(
    source: UInt64[np.ndarray, "m n"],
    out: UInt64[np.ndarray, "k l"],
    halves: np.ndarray,
    steps: np.ndarray,
) -> None:
    """Writes the transpose of bytes, eight to a word, in squares of eight by eight.

    In a square, halves trade places across the diagonal, then quarters, then single bytes.

    Args:
      halves: which bytes of a word are the first half, for each of the three trades.
      steps: the bits by which a half moves.
    """
    square = np.empty((8, source.shape[1]), np.uint64)
    for top in range(source.shape[0] // 8):
        square[:] = source[8 * top : 8 * top + 8]
        for trade in range(3):
            half, bits, away = halves[trade], steps[trade], 4 >> trade
            for i in range(8):
                if i & away == 0:
                    for x in range(source.shape[1]):
                        one, two = square[i, x], square[i + away, x]
                        square[i, x] = (one & half) | ((two & half) << bits)
                        square[i + away, x] = ((one >> bits) & half) | (two & ~half)
        for x in range(source.shape[1]):
            for i in range(8):
                out[8 * x + i, top] = square[i, x]


def weigh_rows(
    source: np.ndarray, starts: np.ndarray, weights: np.ndarray, out: np.ndarray
) -> None:
    """Writes weighted sums of rows, each of those from its start on."""
    total = np.empty(out.shape[1], np.int32)
    for y in range(out.shape[0]):
        total[:] = HALF  # of the last bit: the shift below rounds
        for j in range(weights.shape[1]):
            weight, row = weights[y, j], source[starts[y] + j]
            for x in range(total.size):
                total[x] += weight * np.int32(row[x])
        for x in range(total.size):
            out[y, x] = min(max(total[x] >> BITS, 0), 255)


@functools.cache
def compiled() -> tuple[Callable, Callable] | None:
    """Returns both passes as machine code, kept on disk; None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    array = numba.types.Array
    compile_ = functools.partial(numba.njit, cache=True, nogil=True)
    bytes_, words, weights = (array(t, 2, "C") for t in (numba.uint8, numba.uint64, numba.int32))
    starts, masks = array(numba.int64, 1, "C"), array(numba.uint64, 1, "C")
    return (
        compile_(numba.void(words, words, masks, masks))(inspect.unwrap(turn_squares)),
        compile_(numba.void(bytes_, starts, weights, bytes_))(inspect.unwrap(weigh_rows)),
    )
