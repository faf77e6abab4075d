import io
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from jointseg_jax.data.images import (
    Decoding,
    decode_image,
    decode_labels,
    decode_segment_ids,
    encode_png,
    encode_segment_ids,
)
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(
        out, kind, **options
    )
    return out.getvalue()


def chunk(kind, data):
    checksum = zlib.crc32(kind + data).to_bytes(4, "big")
    return len(data).to_bytes(4, "big") + kind + data + checksum


def png(width, height, bits, colour_type, raw):
    """A PNG of raw scan lines (each with its leading filter byte)."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header += bytes([bits, colour_type, 0, 0, 0])
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def refused(function, data, *parts, **options):
    """Checks that ``data`` is refused with the path and each of ``parts`` in the message."""
    with pytest.raises(BadSample) as caught:
        function(data, "set/x.file", **options)
    text = str(caught.value)
    assert text.startswith("ERROR [data] set/x.file: ")
    for part in parts:
        assert part in text
    return text


@pytest.mark.parametrize("cut", ["half", 100, 2])
def test_truncated_jpeg(cut):  # D1
    data = encoded(noise(64, 64, 3), "JPEG")
    short = data[: len(data) // 2] if cut == "half" else data[:-cut]
    refused(decode_image, short, "truncated", "a whole file. Copy it again from its source.")


def test_truncation_is_never_switched_off(monkeypatch):  # D1
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise(64, 64, 3), "JPEG")
    for function in (decode_image, decode_labels):
        with pytest.raises(UserError, match=r"LOAD_TRUNCATED_IMAGES is True.*set it back to False"):
            function(encoded(noise(4, 4)) if function is decode_labels else data, "x")


def test_bit_rot_in_a_valid_structure_is_accepted():  # D2
    data = bytearray(encoded(noise(64, 64, 3), "JPEG", quality=90))
    data[len(data) // 2] ^= 0x08
    assert decode_image(bytes(data), "x").shape == (64, 64, 3)


def test_files_that_are_no_images():  # D3
    refused(decode_image, b"", "the file is empty; an image file. Copy it again.")
    refused(
        decode_image, b"hello\n" * 20, "not an image; files are JPEG, PNG, WEBP, BMP, TIFF. Replace"
    )
    refused(decode_image, encoded(noise(8, 8, 3), "GIF"), "files are JPEG, PNG, WEBP, BMP")


@pytest.mark.parametrize("kind", ["data", "checksum", "half", "end"])
def test_damaged_png(kind):  # D4
    data = encoded(noise(64, 64, 3))
    start = data.index(b"IDAT")
    end = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    spoilt = bytearray(data)
    spoilt[{"data": start + 1000, "checksum": end}.get(kind, start)] ^= 1
    cut = {"half": data[: len(data) // 2], "end": data[:-12]}.get(kind, bytes(spoilt))
    text = refused(decode_image, cut)
    refused(decode_labels, cut)
    assert "checksum of the PNG does not match (chunk 'IDAT')" in text or "truncated" in text


@given(st.integers(0, 10**6), st.integers(0, 7), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))
@settings(max_examples=80, deadline=None)
def test_damage_gives_an_image_or_a_complaint(place, bit, kind):
    data = bytearray(encoded(noise(16, 16, 3), kind))
    data[place % len(data)] ^= 1 << bit
    for function in (decode_image, decode_labels, decode_segment_ids):
        try:
            assert function(bytes(data), "x").ndim in (2, 3)
        except BadSample as error:
            assert "ERROR [data] x: " in str(error)


def test_palette_and_grey_labels_are_indices():  # D8
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode_labels(encoded(values), "x"), values)
    painted = Image.fromarray(values)
    painted = painted.convert("P")
    painted.putpalette(list(np.random.default_rng(0).permutation(768) % 256))
    np.testing.assert_array_equal(decode_labels(encoded(painted), "x"), values)
    # A transparent palette entry hides nothing.
    data = encoded(painted, transparency=3)
    np.testing.assert_array_equal(decode_labels(data, "x"), values)
    few = Image.fromarray(values % 5).convert("P")
    few.putpalette([9, 9, 9, 1, 2, 3, 200, 0, 0, 0, 0, 7, 5, 5, 5])
    data = encoded(few, bits=4)
    assert data[24] == 4  # a 4-bit palette file, as image editors write them
    np.testing.assert_array_equal(decode_labels(data, "x"), values % 5)


def test_narrow_grey_labels_keep_their_values():  # D8: Pillow widens 2 and 4 bits to 0..255
    assert decode_labels(png(4, 1, 4, 0, bytes([0, 0x1A, 0x3F])), "x").tolist() == [[1, 10, 3, 15]]
    assert decode_labels(png(4, 1, 2, 0, bytes([0, 0b00011011])), "x").tolist() == [[0, 1, 2, 3]]
    assert decode_labels(png(4, 1, 1, 0, bytes([0, 0b01010000])), "x").tolist() == [[0, 1, 0, 1]]


def test_16_bit_labels_are_exact():  # D9
    values = np.array([[0, 255, 256], [40_000, 65_535, 1]], np.uint16)
    np.testing.assert_array_equal(decode_labels(encoded(values), "x"), values)


def test_labels_in_colours_need_a_map():  # D8
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0], pixels[1] = (128, 0, 0), (0, 200, 7)
    text = "labels painted in RGB (different colours: 3, such as "
    refused(decode_labels, encoded(pixels), text, "Save indices, or give a colour map")
    colours = {(0, 0, 0): 4, (128, 0, 0): 0, (0, 200, 7): 300}
    expected = [[0, 4, 4], [300, 300, 300]]
    assert decode_labels(encoded(pixels), "x", colours=colours).tolist() == expected
    opaque = np.dstack([pixels, np.full((2, 3), 255, np.uint8)])
    assert decode_labels(encoded(opaque), "x", colours=colours).tolist() == expected
    del colours[(0, 200, 7)]
    text = "colours (0, 200, 7) (3 px) are not in the colour map; the map has 2 colours"
    refused(decode_labels, encoded(pixels), text, colours=colours)


def test_transparent_labels():  # D8
    grey = np.dstack([noise(4, 4) % 3, np.full((4, 4), 255, np.uint8)])
    np.testing.assert_array_equal(decode_labels(encoded(grey), "x"), grey[..., 0])
    grey[1, 2, 1] = 100
    refused(decode_labels, encoded(grey), "1 label pixels are transparent; labels are opaque")
    rgba = np.dstack([noise(4, 4, 3), np.zeros((4, 4), np.uint8)])
    refused(decode_labels, encoded(rgba), "16 label pixels are transparent", colours={})


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_labels(kind):  # D11
    data = encoded(noise(16, 16) % 3, kind)
    refused(decode_labels, data, f"labels stored as {kind} (lossy: it changes values)")


def test_images_of_other_kinds_become_rgb():  # D9, D10
    grey = noise(6, 5)
    triple = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(decode_image(encoded(grey), "x"), triple)
    high = grey.astype(np.uint16) * 256 + 77
    np.testing.assert_array_equal(decode_image(encoded(high), "x"), triple)
    colour = noise(6, 5, 3)
    for kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(decode_image(encoded(colour, kind), "x"), colour)
    black_and_white = np.where(triple > 127, 255, 0)
    bits = Image.fromarray(grey > 127)
    np.testing.assert_array_equal(decode_image(encoded(bits), "x"), black_and_white)
    palette = Image.fromarray(grey % 4).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 255, 0, 1])
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [255, 0, 1]])
    np.testing.assert_array_equal(decode_image(encoded(palette), "x"), table[grey % 4])
    rows, columns = np.indices((16, 24))
    smooth = np.stack([rows * 9, columns * 9, 200 - rows], -1).astype(np.uint8)
    cmyk = encoded(Image.fromarray(smooth).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    # 3: at quality 100 the JPEG steps are 1, so a smooth picture is off by rounding only.
    assert abs(decode_image(cmyk, "x").astype(int) - smooth).max() <= 3


def test_transparency_shows_the_matte():  # D10
    rgba = np.dstack([noise(4, 4, 3), np.full((4, 4), 255, np.uint8)])
    rgba[0, 0, 3] = 0
    out = decode_image(encoded(rgba), "x")
    assert out[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(out[1:], rgba[1:, :, :3])
    dark = decode_image(encoded(rgba), "x", Decoding(matte=(1, 2, 3)))
    assert dark[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_turned_pictures(kind):  # D10
    picture = Image.fromarray(noise(8, 12, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture, kind, exif=exif)
    refused(decode_image, data, "EXIF orientation 6", "set orientation to 'apply' or 'ignore'")
    left = decode_image(data, "x", Decoding(orientation="ignore"))
    turned = decode_image(data, "x", Decoding(orientation="apply"))
    assert left.shape == (8, 12, 3) and turned.shape == (12, 8, 3)
    np.testing.assert_array_equal(turned, np.rot90(left, -1))
    exif[0x0112] = 1
    assert decode_image(encoded(picture, kind, exif=exif), "x").shape == (8, 12, 3)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("side", [10_000, 14_000, 33_000])
def test_decompression_bombs(side, monkeypatch):  # D12
    data = png(side, side, 1, 0, bytes(1 + side // 8) * side)
    assert len(data) < 200_000

    def decode(picture):
        raise AssertionError("pixels of a bomb were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for function in (decode_image, decode_labels):
            refused(function, data, "the limit is 64000000 pixels. Make it smaller, or raise pixel")


def test_pixel_limit_is_a_setting():
    data = encoded(noise(10, 10, 3))
    text = "10x10 = 100 pixels; the limit is 99 pixels"
    refused(lambda d, p: decode_image(d, p, Decoding(pixel_limit=99)), data, text)
    refused(decode_labels, data, text, pixel_limit=99)


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**24 - 1))
@settings(max_examples=30, deadline=None)
def test_segment_ids_survive(a, b):
    ids = np.array([[a, b, 0]], np.int32)
    np.testing.assert_array_equal(decode_segment_ids(encode_segment_ids(ids), "x"), ids)


def test_segment_ids_that_do_not_fit():
    with pytest.raises(ValueError, match=r"24 bits hold 0\.\.16777215"):
        encode_segment_ids(np.array([[1 << 24]], np.int32))
    refused(decode_segment_ids, encode_png(noise(4, 4)), "a PNG of mode L", "R + 256 G + 65536 B")


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"orientation": "turn"}, "one of: refuse, apply, ignore"),
        ({"pixel_limit": 0}, "must lie in"),
    ],
)
def test_refused_rules(fields, text):
    with pytest.raises(ValueError, match=text):
        Decoding(**fields)


TIFF_KINDS = ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]


@pytest.mark.parametrize("compression", TIFF_KINDS)
def test_lossless_tiff_is_read_as_image_and_as_labels(compression):
    rgb, labels = noise(5, 7, 3), noise(5, 7)
    np.testing.assert_array_equal(
        decode_image(encoded(rgb, "TIFF", compression=compression), "x"), rgb
    )
    deep = labels.astype(np.uint16) * 257
    for values in (labels, deep):
        data = encoded(values, "TIFF", compression=compression)
        np.testing.assert_array_equal(decode_labels(data, "x"), values)
    painted = Image.fromarray(labels).convert("P")
    np.testing.assert_array_equal(decode_labels(encoded(painted, "TIFF"), "x"), labels)


def test_tiff_that_would_change_labels_is_refused():
    rgb = noise(16, 16, 3)
    data = encoded(rgb, "TIFF", compression="jpeg")
    refused(decode_labels, data, "labels stored as TIFF of jpeg; labels are PNG or lossless TIFF")
    refused(decode_labels, encoded(rgb, "WEBP", lossless=True), "labels stored as WEBP (lossy")
    inverted = encoded(noise(4, 4), "TIFF", tiffinfo={262: 0})
    refused(decode_labels, inverted, "a TIFF whose value 0 is white")
    pages = [Image.fromarray(noise(4, 4, 3)) for _ in range(3)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    refused(decode_image, data, "a TIFF of 3 pictures; one picture a file")
    refused(decode_image, b"II*\0" + bytes(60), "TIFF")


def turned(orientation, kind, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, kind, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_every_orientation_is_applied_ignored_or_refused(kind, orientation):
    rgb = noise(3, 5, 3)
    data = turned(orientation, kind, rgb)
    ways = {2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.transpose(1, 0, 2)}
    ways |= {6: np.rot90(rgb, -1), 7: np.rot90(rgb, 2).transpose(1, 0, 2), 8: np.rot90(rgb)}
    applied = decode_image(data, "x", Decoding(orientation="apply"))
    np.testing.assert_array_equal(applied, ways[orientation])
    np.testing.assert_array_equal(decode_image(data, "x", Decoding(orientation="ignore")), rgb)
    refused(decode_image, data, f"EXIF orientation {orientation}")
    # Labels are what is stored, in either kind.
    labels = turned(orientation, kind, rgb[..., 0].copy())
    np.testing.assert_array_equal(decode_labels(labels, "x"), rgb[..., 0])


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientations_that_exif_does_not_know_turn_nothing(orientation):
    rgb = noise(3, 5, 3)
    for rule in ("refuse", "apply", "ignore"):
        read = decode_image(turned(orientation, "PNG", rgb), "x", Decoding(orientation=rule))
        np.testing.assert_array_equal(read, rgb)


def test_a_damaged_exif_block_leaves_the_pixels_whole():
    rgb = noise(3, 5, 3)
    plain = encoded(rgb)
    for block in (b"", b"MM\0*", b"II*\0\xff\xff\xff\xff", b"nonsense" * 9):
        data = plain[:33] + chunk(b"eXIf", block) + plain[33:]
        np.testing.assert_array_equal(decode_image(data, "x"), rgb)


LARGE = zlib.compress(b"x" * (3 << 20))
METADATA = {
    "iTXt": (b"iTXt", b"prompt\0\1\0\0\0" + LARGE),
    "zTXt": (b"zTXt", b"prompt\0\0" + LARGE),
    "tEXt": (b"tEXt", b"prompt\0" + b"x" * (2 << 20)),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "profile": (b"iCCP", b"profile\0\0" + LARGE),
    "profile of an unknown method": (b"iCCP", b"profile\0\7" + LARGE),
    "empty profile": (b"iCCP", b""),
    "short chromaticities": (b"cHRM", b"\0"),
    "text that is no archive": (b"zTXt", b"prompt\0\0nonsense"),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("before", [True, False])
def test_metadata_of_a_png_never_cost_its_pixels(name, before):
    rgb, extra = noise(3, 5, 3), chunk(*METADATA[name])
    for pixels, decode in ((rgb, decode_image), (rgb[..., 0].copy(), decode_labels)):
        plain = encoded(pixels)
        at = 33 if before else len(plain) - 12  # behind the header, or before the end
        np.testing.assert_array_equal(decode(plain[:at] + extra + plain[at:], "x"), pixels)


@pytest.mark.parametrize("padding", [0, 3 << 20])
def test_the_turn_that_a_text_chunk_gives_is_seen_at_any_size(padding):
    plain = encoded(noise(3, 5, 3))
    xmp = b'<x tiff:Orientation="6"/>' + b" " * padding
    extra = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
    refused(decode_image, plain[:33] + extra + plain[33:], "EXIF orientation 6")
    exif = "\n".join(["", "exif", "9", "00" * (1 << 20)]).encode()
    extra = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif))
    refused(
        decode_image, plain[:33] + extra + plain[33:], "an EXIF block of 2097", "at most 1048576"
    )


def test_a_wrong_checksum_of_metadata_is_still_damage():
    plain = encoded(noise(3, 5, 3))
    extra = chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    refused(decode_image, plain[:33] + extra + plain[33:], "a checksum of the PNG does not match")
