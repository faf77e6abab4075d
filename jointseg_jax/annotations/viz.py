"""Pictures for people: coloured label maps, overlays, contact sheets, PNG files (NumPy, Pillow).

The same array gives the same bytes: no time stamps, no metadata, one fixed compression level.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from jointseg_jax.data.classes import VOID_COLOUR, Classes, voc_palette
from jointseg_jax.types import FILE_VOID, VOID

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
Picture = UInt8[np.ndarray, "_ _ 3"]
Labels = Integer[np.ndarray, "_ _"]
Pictures = Sequence[Picture] | UInt8[np.ndarray, "_ _ _ 3"]
LabelMaps = Sequence[Labels] | Integer[np.ndarray, "_ _ _"]

PAPER = (255, 255, 255)
INK = (60, 60, 60)
GAP = 6
READABLE = 128
"""Pictures are enlarged by whole numbers to about this height, in pixels of the sheet."""
CAPTION_LINES = 3
FONT = ImageFont.load_default  # Pillow's own: the same pixels wherever the sheet is drawn


def colourise(labels: Integer[np.ndarray, "*batch height width"], classes: Classes) -> np.ndarray:
    """Paints label maps in their classes' colours (uint8 [..., height, width, 3])."""
    index = _file_values(labels, classes)
    return _palette(classes)[index]


def borders(labels: Labels) -> Bool[np.ndarray, "height width"]:
    """Marks the pixels whose right or lower neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1, :] |= labels[:-1, :] != labels[1:, :]
    return edge


def overlay(
    image: Picture,
    labels: Labels,
    classes: Classes,
    alpha: float = 0.5,
    outlines: bool = True,
    segments: Labels | None = None,
) -> Picture:
    """Blends coloured labels over a picture but for VOID; outlines them, and instance ids."""
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"overlay: picture {image.shape[:2]} and labels {labels.shape} given; "
            "they must have the same height and width"
        )
    colours = colourise(labels, classes)
    weight = np.where(labels == VOID, 0.0, alpha)[..., None]
    mixed = np.round((1.0 - weight) * image + weight * colours).astype(np.uint8)
    if outlines:
        mixed[borders(labels)] = PAPER
        if segments is not None:
            mixed[borders(segments)] = PAPER
    return mixed


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Repeats every pixel ``scale`` times both ways."""
    if scale < 1:
        raise ValueError(f"pictures: scale {scale} given; it must be a whole number of at least 1")
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


def triplet(
    image: Picture, labels: Labels, classes: Classes, scale: int = 1, segments: Labels | None = None
) -> Picture:
    """Sets picture, label map and overlay side by side; borders are drawn at the final size."""
    # Enlarged before drawing: borders stay one pixel wide.
    large, marked = enlarge(image, scale), enlarge(labels, scale)
    outlined = None if segments is None else enlarge(segments, scale)
    mixed = overlay(large, marked, classes, segments=outlined)
    return beside([large, colourise(marked, classes), mixed], GAP // 3)


def pair_sheet(
    images: Pictures,
    labels: LabelMaps,
    classes: Classes,
    *,
    captions: Sequence[str] = (),
    columns: int = 4,
    scale: int | None = None,
    title: str = "",
    segments: LabelMaps | None = None,
) -> Picture:
    """Lays out pairs as captioned triplets in columns, with a legend of the classes present."""
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"pair_sheet: {len(images)} pictures and {len(labels)} label maps given; "
            "give one map per picture, and at least one pair"
        )
    scale = scale or max(1, round(READABLE / images[0].shape[0]))
    instances = [None] * len(images) if segments is None else segments
    cells = [triplet(i, m, classes, scale, s) for i, m, s in zip(images, labels, instances)]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    words = [captions[i : i + columns] for i in range(0, len(cells), columns)] if captions else ()
    present = np.unique(np.concatenate([np.unique(m) for m in labels])).tolist()
    return contact_sheet(rows, captions=words, legend=classes, present=present, title=title)


def contact_sheet(
    rows: Sequence[Sequence[Picture]],
    *,
    scale: int = 1,
    captions: Sequence[Sequence[str]] = (),
    legend: Classes | None = None,
    present: Sequence[int] | None = None,
    title: str = "",
) -> Picture:
    """Arranges pictures in rows with small captions below each, a title above and a legend below.

    Args:
      captions: same nesting as rows; rows and cells may be missing at the end.
      present: the class indices (or ``VOID``) the legend shows; all when not given.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("contact_sheet: an empty row or no rows given; give one picture per row")
    height = max(cell.shape[0] for row in rows for cell in row) * scale
    width = max(cell.shape[1] for row in rows for cell in row) * scale
    texts = [[*(captions[i] if i < len(captions) else ())] for i in range(len(rows))]
    strips = []
    for row, line in zip(rows, texts):
        cells = [_padded(enlarge(cell, scale), height, width) for cell in row]
        if captions:
            line = [*line, *[""] * len(row)][: len(row)]
            notes = _texts(line, width, CAPTION_LINES)
            cells = [_stack([cell, note], 2) for cell, note in zip(cells, notes)]
        strips.append(beside(cells, 2 * GAP))
    wide = max(strip.shape[1] for strip in strips)
    if title:
        strips.insert(0, _texts([title], wide, 2, size=15)[0])
    if legend is not None:
        strips.append(legend_strip(legend, wide, present))
    sheet = _stack(strips, 2 * GAP)
    # white as ``PAPER`` is, in all channels
    return np.pad(sheet, ((2 * GAP, 2 * GAP), (2 * GAP, 2 * GAP), (0, 0)), constant_values=255)


def legend_strip(classes: Classes, width: int, present: Sequence[int] | None = None) -> Picture:
    """Draws a colour patch and the name of each class, in as many lines as the width needs."""
    font, line = FONT(size=12), 18
    indices = range(len(classes)) if present is None else present
    named = list(zip(classes.palette, classes.names))
    entries = [(VOID_COLOUR, classes.void) if i == VOID else named[i] for i in indices]
    # Placed first: the height of the canvas follows from it.
    corners, x, y = [], 0, 0
    for _, name in entries:
        need = line + int(font.getlength(name)) + 2 * GAP
        if x and x + need > width:
            x, y = 0, y + line
        corners.append((x, y))
        x += need
    canvas = Image.new("RGB", (width, y + line), PAPER)
    pen = ImageDraw.Draw(canvas)
    for (colour, name), (x, y) in zip(entries, corners):
        pen.rectangle((x, y + 3, x + 12, y + 15), fill=colour, outline=INK)
        pen.text((x + line, y + 2), name, fill=INK, font=font)
    return np.asarray(canvas)


def beside(pictures: Sequence[Picture], gap: int) -> Picture:
    """Sets pictures side by side, aligned at the top, with a gap of paper between."""
    return _stack([picture.transpose(1, 0, 2) for picture in pictures], gap).transpose(1, 0, 2)


def png_bytes(array: np.ndarray) -> bytes:
    """Encodes a uint8 picture, [height, width] grey or [height, width, 3] RGB, as PNG."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise ValueError(
            f"png_bytes: {array.dtype} array of shape {array.shape} given; "
            "give uint8 of 2 axes (grey) or 3 axes (RGB)"
        )
    return _encoded(Image.fromarray(np.ascontiguousarray(array)))


def palette_png_bytes(labels: Labels, classes: Classes) -> bytes:
    """Encodes label values as an indexed PNG: file value = label, 255 = no annotation."""
    # Indices, not colours: the file is labels for programs and a picture for people.
    image = Image.fromarray(np.ascontiguousarray(_file_values(labels, classes)))
    image.putpalette(_palette(classes).tobytes())
    return _encoded(image)


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes a uint8 picture as PNG."""
    Path(path).write_bytes(png_bytes(array))


def save_palette_png(path: str | os.PathLike, labels: Labels, classes: Classes) -> None:
    """Writes label values as an indexed PNG in the classes' colours."""
    Path(path).write_bytes(palette_png_bytes(labels, classes))


def _file_values(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Returns labels as uint8, VOID as 255."""
    if len(classes) > FILE_VOID:
        raise ValueError(
            f"pictures: {len(classes)} classes given; 8-bit label files hold at most {FILE_VOID}"
        )
    bad = (labels != VOID) & ((labels < 0) | (labels >= len(classes)))
    if bad.any():
        raise ValueError(
            f"pictures: labels {np.unique(labels[bad])[:8].tolist()} given ({bad.sum()} px); "
            f"they must be 0..{len(classes) - 1} or {VOID}; check the class list"
        )
    return np.where(labels == VOID, FILE_VOID, labels).astype(np.uint8)


def _palette(classes: Classes) -> np.ndarray:
    """Returns 256 colours: the classes', VOC's for unused values, and the void colour last."""
    table = np.array(voc_palette(256), np.uint8)
    table[: len(classes)] = classes.colours
    table[FILE_VOID] = VOID_COLOUR
    return table


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # The level is part of the contract: the same array gives the same bytes.
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _texts(texts: Sequence[str], width: int, most: int, size: int = 12) -> list[np.ndarray]:
    """Draws texts broken at words, all in the lines that the longest needs, at most ``most``."""
    font, step = FONT(size=size), size + 3
    broken = [_wrapped(text.split(), font, width, most) for text in texts]
    height = max(1, *(len(lines) for lines in broken)) * step
    drawn = []
    for lines in broken:
        canvas = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(canvas)
        for i, line in enumerate(lines):
            pen.text((0, i * step), line, fill=INK, font=font)
        drawn.append(np.asarray(canvas))
    return drawn


def _wrapped(words: list[str], font: Font, width: int, most: int) -> list[str]:
    """Breaks words into lines of a width in pixels; what does not fit ends in dots."""
    lines: list[str] = []
    for word in words:
        if lines and font.getlength(longer := f"{lines[-1]} {word}") <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1] + " ..."]


def _stack(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Stacks pictures downwards on paper, aligned at the left."""
    width = max(picture.shape[1] for picture in pictures)
    space = np.full((gap, width, 3), PAPER, np.uint8)
    parts: list[np.ndarray] = []
    for picture in pictures:
        parts += [space, _padded(picture, picture.shape[0], width)]
    return np.concatenate(parts[1:])


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    sheet = np.full((height, width, 3), PAPER, np.uint8)
    sheet[: picture.shape[0], : picture.shape[1]] = picture
    return sheet
