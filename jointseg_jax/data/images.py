"""Image files to arrays: Pillow only, strictly, by declared rules.

| image file | becomes |
|---|---|
| RGB | itself |
| grey, 1-bit | three equal channels |
| palette, with alpha (RGBA, LA) | RGB, laid over ``matte`` by its alpha |
| CMYK | RGB as Pillow converts (no colour profile) |
| 16 bits a channel | the high byte |
| EXIF orientation other than 1 | refused, turned or left, by ``orientation`` |

| label file (PNG or lossless TIFF) | becomes |
|---|---|
| palette | its indices; colours and transparency do not matter |
| grey of 1, 2, 4, 8, 16 bits | its stored values, exactly |
| RGB, RGBA | indices through an explicit colour map, or refused |
"""

import ctypes
import io
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from jointseg_jax.data.classes import Colour
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

# Imported so that Pillow knows the formats; several pictures in one JPEG ("MPO") come with JPEG.
PLUGINS = (BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WHITE_IS_ZERO = 0  # of a TIFF: Pillow inverts its values
LOSSLESS_TIFF = (
    "raw",
    "tiff_lzw",
    "tiff_adobe_deflate",
    "tiff_deflate",
    "packbits",
    "lzma",
    "zstd",
)
LOSSY = {"JPEG", "MPO", "WEBP"}
ORIENTATIONS = ("refuse", "apply", "ignore")
PIXEL_LIMIT = 64_000_000
PILLOW_LIMIT = 89_478_485  # beyond it Pillow itself warns, and at twice that it refuses

WHOLE = ("a whole file", "Copy it again from its source.")
"""What damaged files should be, and the remedy."""

PLACES = np.array([1, 256, 65536], np.int32)
"""What red, green and blue count in a segment id."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of mallopt, in malloc.h
LARGEST = 32 << 20  # the most that mallopt takes: arrays up to it come from the heap
KEPT = 256 << 20  # bytes of a heap that may lie free


def keep_freed_memory() -> bool:
    """Sets glibc's malloc to keep what is freed; returns True if it did.

    Another C library is left alone, and so is a process whose environment sets malloc
    (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES`` and the like).
    """
    # By default arrays of a megabyte go back to the system as soon as they are freed, and it clears
    # every page of the next one: a quarter of the time of reading a pair of 640 x 480.
    library = ctypes.CDLL(None)
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(MMAP_THRESHOLD, LARGEST), library.mallopt(TRIM_THRESHOLD, KEPT)])


# Pillow does the same with the memory of every picture: a fifth of the time of reading a pair.
# (PILLOW_BLOCKS_MAX says otherwise.)
if not Image.core.get_blocks_max():
    Image.core.set_blocks_max(8)
keep_freed_memory()


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The rules by which image files become 8-bit RGB."""

    pixel_limit: int = PIXEL_LIMIT  # most pixels; checked in the header, before decoding
    orientation: str = "refuse"
    """What to do with a picture that EXIF says is turned. Its labels may or may not be turned with
    it: ``refuse`` it, ``apply`` the turn to the image, or ``ignore`` it."""
    matte: Colour = (255, 255, 255)  # the colour that shows through transparent pixels

    def __post_init__(self) -> None:
        limit, orientation = self.pixel_limit, self.orientation
        if not 0 < limit <= PILLOW_LIMIT:
            raise ValueError(f"Decoding: pixel_limit={limit} given; must lie in 1..{PILLOW_LIMIT}.")
        if orientation not in ORIENTATIONS:
            known = ", ".join(ORIENTATIONS)
            raise ValueError(f"Decoding: orientation={orientation!r} given; one of: {known}.")


def decode_image(
    data: bytes, path: str, rules: Decoding = Decoding()
) -> UInt8[np.ndarray, "height width 3"]:
    """Decodes an image file to RGB; ``path`` is for messages."""
    picture = orient(open_picture(data, path, rules.pixel_limit), path, rules.orientation)
    load(picture, path)
    if picture.mode not in CONVERSIONS:
        rule = f"modes that have a rule are {', '.join(CONVERSIONS)}"
        raise BadSample(path, f"an image of mode {picture.mode}", rule, "Convert it to 8-bit RGB.")
    return CONVERSIONS[picture.mode](picture, rules.matte)


def decode_labels(
    data: bytes,
    path: str,
    *,
    colours: Mapping[Colour, int] | None = None,
    pixel_limit: int = PIXEL_LIMIT,
) -> Int32[np.ndarray, "height width"]:
    """Decodes a label file to its values; ``colours`` has those of labels painted in RGB."""
    picture = open_labels(data, path, pixel_limit)
    pixels = opaque(picture, path)
    if picture.mode in ("RGB", "RGBA"):
        return paint_to_values(pixels, path, colours)
    if picture.mode == "LA":
        return pixels[..., 0].astype(np.int32)
    # Pillow has multiplied grey values of 2 and 4 bits by 255 / (2**bits - 1): divided again, they
    # are those of the file. Bytes 24 and 25 of a PNG are its bits and colour type; type 0 is grey.
    png_grey = data.startswith(PNG_START) and data[25] == 0
    step = {2: 85, 4: 17}.get(data[24], 1) if png_grey else 1
    values = pixels.astype(np.int32)
    return values if step == 1 else values // step


def decode_segment_ids(
    data: bytes, path: str, *, pixel_limit: int = PIXEL_LIMIT
) -> Int32[np.ndarray, "height width"]:
    """Decodes an RGB file of segment ids, R + 256 G + 65536 B."""
    picture = open_labels(data, path, pixel_limit)
    if picture.mode not in ("RGB", "RGBA"):
        rule = "segment ids are stored in RGB as R + 256 G + 65536 B"
        remedy = "Give the panoptic PNG, not the semantic one."
        raise BadSample(path, f"a PNG of mode {picture.mode}", rule, remedy)
    return opaque(picture, path).astype(np.int32) @ PLACES


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 RGB, uint8 grey or uint16 grey as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def encode_segment_ids(ids: Int32[np.ndarray, "height width"]) -> bytes:
    """Encodes ids below 2**24 as an RGB PNG, R + 256 G + 65536 B."""
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= 1 << 24:
        raise ValueError(f"segment ids {ids.min()}..{ids.max()}; 24 bits hold 0..{(1 << 24) - 1}")
    channels = [(ids >> shift) & 255 for shift in (0, 8, 16)]
    return encode_png(np.stack(channels, -1).astype(np.uint8))


def open_picture(data: bytes, path: str, pixel_limit: int) -> Image.Image:
    """Reads the header: kind and size, no pixels yet."""
    if not data:
        raise BadSample(path, "the file is empty", "an image file", "Copy it again.")
    try:
        picture = Image.open(io.BytesIO(without_metadata(data, path)), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, str(error), pixel_limit) from None
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(TIFF_STARTS):
            rule = "TIFF is grey or RGB of 8 bits, grey of 16 bits, or has a palette"
            raise BadSample(path, "a TIFF of another kind", rule, "Convert it to PNG.") from error
        rule = f"files are {', '.join(FORMATS)}"
        raise BadSample(path, "not an image", rule, "Replace the file.") from error
    except Exception as error:  # plugins raise whatever a damaged header makes them raise
        raise truncated(path, str(error)) from error
    if picture.width * picture.height > pixel_limit:
        size = f"{picture.width}x{picture.height} = {picture.width * picture.height} pixels"
        raise _too_large(path, size, pixel_limit)
    if picture.format == "PNG":
        check_chunks(data, path)
    if picture.format == "TIFF" and (count := getattr(picture, "n_frames", 1)) > 1:
        remedy = "Save each of them as a file of its own."
        raise BadSample(path, f"a TIFF of {count} pictures", "one picture a file", remedy)
    return picture


def _too_large(path: str, size: str, limit: int) -> BadSample:
    remedy = "Make it smaller, or raise pixel_limit."
    return BadSample(path, size, f"the limit is {limit} pixels", remedy)


def check_chunks(data: bytes, path: str) -> None:
    """Refuses a PNG with a wrong checksum, or without its end: Pillow lets both pass."""
    # after 8 bytes of signature: length (4) | kind (4) | data (length) | CRC-32 of kind, data (4)
    start, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(data[start : start + 4], "big")
        kind, end = data[start + 4 : start + 8], start + 8 + length
        if len(data) < end + 4:
            raise truncated(path)
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            found = f"a checksum of the PNG does not match (chunk {kind.decode('latin1')!r})"
            raise BadSample(path, found, *WHOLE)
        start = end + 4


PNG_KEPT = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
"""Chunks of a PNG that matter to its pixels, besides the critical ones."""
TURNING_TEXT = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
"""Keywords of text chunks that may say how a picture is turned."""
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)[0-9]')
TEXT_LIMIT, UNPACKED_LIMIT = 1 << 20, 64 << 20  # bytes: what Pillow reads, and what is looked at


def without_metadata(data: bytes, path: str) -> bytes:
    """Returns a PNG without what its pixels do not need; other files as they are.

    Pillow gives up at large or odd texts and colour profiles, which play no part here.
    """
    if not data.startswith(PNG_START):
        return data
    parts, start, kind = [PNG_START], len(PNG_START), b""
    while start < len(data) and kind != b"IEND":
        # length (4) | kind (4) | data (length) | CRC-32 (4)
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 12 + length
        # A capital says that a chunk is critical.
        if kind[:1].isupper() or kind in PNG_KEPT:
            parts.append(data[start:end])
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            parts.append(turning_text(kind, data[start + 8 : start + 8 + length], path))
        start = end
    return b"".join(parts)


def turning_text(kind: bytes, content: bytes, path: str) -> bytes:
    """Returns a text chunk that may say how the picture is turned, else nothing."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in TURNING_TEXT:
        return b""
    # zTXt: method (1) | packed.  iTXt: is packed (1) | method (1) | language 0 | keyword 0 | text
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    text = rest[1:] if kind == b"zTXt" else rest
    if kind == b"iTXt":
        text = rest[2:].split(b"\0", 2)[-1]
    if packed:
        unpacking = zlib.decompressobj()
        try:
            text = unpacking.decompress(text, UNPACKED_LIMIT)
        except zlib.error:
            return b""  # as Pillow does
        if unpacking.unconsumed_tail:
            found = f"metadata of more than {UNPACKED_LIMIT >> 20} MB (chunk {kind.decode()})"
            raise BadSample(path, found, "smaller metadata", "Save the picture without them.")
    if len(text) <= TEXT_LIMIT:
        return _chunk(kind, content)
    if keyword == TURNING_TEXT[0]:
        said = XMP_ORIENTATION.search(text)
        return _chunk(b"tEXt", keyword + b"\0" + said[0]) if said else b""
    found = f"an EXIF block of {len(text)} bytes as text"
    raise BadSample(path, found, f"at most {TEXT_LIMIT}", "Save the picture without it.")


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def truncated(path: str, why: str = "") -> BadSample:
    """Returns the problem that the file ends too early."""
    return BadSample(path, f"the file is truncated or damaged{f' ({why})' if why else ''}", *WHOLE)


def load(picture: Image.Image, path: str) -> None:
    """Decodes the pixels, refusing truncated files."""
    # A switch of the whole process, which other libraries throw: it is looked at every time.
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError(
            "ERROR [data] PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True in this process, so damaged "
            "files would pass unnoticed; it must be False. TFDS sets it when it draws thumbnails "
            "(tfds.as_dataframe, tfds.show_examples): set it back to False after those."
        )
    try:
        picture.load()
    except Exception as error:
        raise truncated(path, str(error)) from error


def orient(picture: Image.Image, path: str, rule: str) -> Image.Image:
    """Turns, refuses or leaves a picture that EXIF says is turned."""
    turn = turn_of(picture)
    if turn is None:
        return picture
    if rule == "ignore":
        return as_stored(picture, path)
    if rule == "apply":
        load(picture, path)
        turned = isinstance(picture, TiffImagePlugin.TiffImageFile)
        return picture if turned else picture.transpose(TURNS[turn])
    found = f"EXIF orientation {turn}: viewers turn this picture, its labels may not be turned"
    remedy = "Turn the pixels and drop the tag, or set orientation to 'apply' or 'ignore'."
    raise BadSample(path, found, "orientation 1 where there are labels", remedy)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture of each EXIF orientation but 1 is turned upright."""


def turn_of(picture: Image.Image) -> int | None:
    """Returns the EXIF orientation, a key of ``TURNS``; None for upright.

    Values that EXIF does not know, and a block that cannot be read, turn nothing in any viewer.
    """
    try:
        turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a damaged block makes Pillow raise: the pixels may be whole
        return None
    return turn if isinstance(turn, int) and turn in TURNS else None


def as_stored(picture: Image.Image, path: str) -> Image.Image:
    """Returns the decoded picture as its file holds it, whatever EXIF says."""
    turn = turn_of(picture)
    load(picture, path)
    # Pillow turns a TIFF as soon as its pixels are loaded, and no other kind.
    if turn is None or not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return picture
    return picture.transpose(TURNS[{6: 8, 8: 6}.get(turn, turn)])


def open_labels(data: bytes, path: str, pixel_limit: int) -> Image.Image:
    """Opens and decodes a label file: PNG, in a mode that can hold labels."""
    picture = open_picture(data, path, pixel_limit)
    stored = picture.info.get("compression") if picture.format == "TIFF" else None
    # Lossless WebP and others exist, but no data set keeps labels in them.
    if picture.format != "PNG" and stored not in LOSSLESS_TIFF:
        lossy = " (lossy: it changes values)" if picture.format in LOSSY else ""
        found = f"labels stored as {picture.format}{f' of {stored}' if stored else ''}{lossy}"
        remedy = "Export the labels again from their source as PNG."
        raise BadSample(path, found, "labels are PNG or lossless TIFF", remedy)
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        check_tiff_labels(picture, path)
    picture = as_stored(picture, path)
    if picture.mode not in ("1", "L", "P", "I;16", "I;16B", "I", "LA", "RGB", "RGBA"):
        found = f"labels of mode {picture.mode}"
        raise BadSample(path, found, "palette or grey PNG", "Export them again.")
    return picture


def check_tiff_labels(picture: TiffImagePlugin.TiffImageFile, path: str) -> None:
    """Refuses a TIFF whose grey values Pillow would change."""
    found, tags = "", picture.tag_v2
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        found = "labels of a TIFF whose value 0 is white"
    elif picture.mode == "L" and (bits := tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]) != 8:
        found = f"labels of a TIFF of {bits} bits"
    if found:
        rule = "labels in TIFF are grey of 8 or 16 bits from black up, or have a palette"
        raise BadSample(path, found, rule, "Export them again as PNG.")


def opaque(picture: Image.Image, path: str) -> np.ndarray:
    """Returns the pixels of a label file without their alpha, which must be 255 all over."""
    pixels = np.asarray(picture)
    if picture.mode not in ("LA", "RGBA"):
        return pixels
    if count := int((pixels[..., -1] != 255).sum()):
        found = f"{count} label pixels are transparent"
        raise BadSample(path, found, "labels are opaque", "Fill them in.")
    return pixels[..., :-1]


def paint_to_values(
    pixels: UInt8[np.ndarray, "height width 3"], path: str, colours: Mapping[Colour, int] | None
) -> Int32[np.ndarray, "height width"]:
    """Looks every colour up in the colour map."""
    codes = pixels.astype(np.int32) @ PLACES  # one number per colour: unique of rows is slow
    _, first, inverse, counts = np.unique(
        codes, return_index=True, return_inverse=True, return_counts=True
    )
    names = [(int(r), int(g), int(b)) for r, g, b in pixels.reshape(-1, 3)[first]]
    if colours is None:
        found = f"labels painted in RGB (different colours: {len(names)}, such as {names[0]})"
        rule = "labels are palette or grey PNG of indices"
        raise BadSample(path, found, rule, "Save indices, or give a colour map (colours=...).")
    unknown = [f"{name} ({n} px)" for name, n in zip(names, counts) if name not in colours]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        found = f"colours {', '.join(unknown[:5])}{more} are not in the colour map"
        remedy = "Fix the labels, or add the colours to the map."
        raise BadSample(path, found, f"the map has {len(colours)} colours", remedy)
    values = np.array([colours[name] for name in names], np.int32)
    return values[inverse].reshape(codes.shape)


def _plain(picture: Image.Image, matte: Colour) -> np.ndarray:
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _high_byte(picture: Image.Image, matte: Colour) -> np.ndarray:
    # Pillow's own conversion clips at 255 instead.
    grey = (np.asarray(picture).astype(np.int32) >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _over_matte(picture: Image.Image, matte: Colour) -> np.ndarray:
    rgba = picture.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (*matte, 255))
    return np.asarray(Image.alpha_composite(canvas, rgba).convert("RGB"))


CONVERSIONS = (
    dict.fromkeys(("RGB", "L", "1", "CMYK"), _plain)
    | dict.fromkeys(("P", "PA", "LA", "RGBA"), _over_matte)
    | dict.fromkeys(("I;16", "I;16B", "I"), _high_byte)
)
"""How a picture of each of Pillow's modes becomes RGB."""
