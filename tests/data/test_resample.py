"""One result, whoever computes it: Pillow a pass at a time, our passes in Python or compiled."""

import sys

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.data import resample
from jointseg_jax.data.transforms import mirror

PLAIN = (resample.turn_squares, resample.weigh_rows)


def pixels(height, width, *, writeable=True):
    made = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    made.setflags(write=writeable)
    return made


def by(monkeypatch, passes, *arguments):
    monkeypatch.setattr(resample, "WORTH", 0)
    monkeypatch.setattr(resample, "compiled", lambda: passes)
    return resample.resample(*arguments)


WHOLE = (0.0, 0.0, 17.0, 23.0)
CASES = [
    ((12, 9), WHOLE),  # fewer rows and columns: the order in which Pillow's versions differ
    ((8, 30), WHOLE),
    ((30, 8), WHOLE),
    ((34, 46), WHOLE),
    ((17, 23), (0.0, 0.0, 17.0, 23.0)),
    ((11, 13), (2.3, 4.7, 9.1, 12.4)),
    ((1, 1), (16.0, 22.0, 1.0, 1.0)),
    ((40, 7), (0.6, 20.9, 16.4, 2.1 + 1e-12)),  # an edge pushed past the last pixel by rounding
]


@pytest.mark.parametrize("target, box", CASES)
def test_passes_over_rows_are_pillows_to_the_last_bit(target, box, monkeypatch):
    image = pixels(17, 23)
    want = by(monkeypatch, None, image, target, box)
    np.testing.assert_array_equal(by(monkeypatch, PLAIN, image, target, box), want)
    assert want.shape == (*target, 3) and want.flags.writeable


@pytest.mark.thorough
def test_compiled_passes_are_pillows_to_the_last_bit(monkeypatch):
    pytest.importorskip("numba")
    passes = resample.compiled()
    for target, box in [*CASES, ((131, 190), (0.0, 1.5, 17.0, 20.0))]:
        for writeable in (True, False):  # arrays that share a picture's memory are read-only
            image = pixels(17, 23, writeable=writeable)
            want = by(monkeypatch, None, image, target, box)
            np.testing.assert_array_equal(by(monkeypatch, passes, image, target, box), want)


def test_enlarging_is_one_call_of_pillow():
    image, box = pixels(17, 23), (0.0, 3.0, 17.0, 17.0)
    want = Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC, box=(3, 0, 20, 17))
    np.testing.assert_array_equal(resample.resample(image, (32, 32), box), np.asarray(want))


def test_code_is_compiled_for_large_pictures_only(monkeypatch):
    asked = []
    monkeypatch.setattr(resample, "compiled", lambda: asked.append(1))
    small = resample.resample(pixels(20, 20), (64, 64), (0.0, 0.0, 20.0, 20.0))
    assert small.shape == (64, 64, 3) and not asked
    resample.resample(pixels(20, 20), (256, 128), (0.0, 0.0, 20.0, 20.0))
    assert asked


def test_without_numba_pillow_does_it(monkeypatch):
    resample.compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)  # an import of it now fails
    try:
        assert resample.compiled() is None
        assert resample.resample(pixels(9, 9), (256, 256), (0.0, 0.0, 9.0, 9.0)).shape[0] == 256
    finally:
        resample.compiled.cache_clear()


def test_weights_sum_to_one_and_their_centre_is_the_outputs():
    for length, low, high, count in [(40, 0.0, 40.0, 13), (40, 7.5, 31.25, 90)]:
        starts, weights = resample.taps(length, low, high, count)
        assert starts.min() >= 0 and (starts + weights.shape[1]).max() <= length
        one = 1 << resample.BITS
        assert abs(weights.sum(1) - one).max() <= weights.shape[1] / 2  # each is rounded to 1/2
        inner = (starts > 0) & (starts + weights.shape[1] < length)
        places = starts[:, None] + np.arange(weights.shape[1]) + 0.5
        centres = low + (np.arange(count) + 0.5) * (high - low) / count
        found = (weights * places).sum(1) / weights.sum(1)
        # cubic convolution keeps straight lines; a widened kernel, cut off at whole pixels, nearly
        assert abs(found - centres)[inner].max() < (0.15 if count < 20 else 1e-4)


@pytest.mark.parametrize("shape", [(3, 5), (4, 7, 3)])
def test_mirror(shape):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    array.setflags(write=False)
    np.testing.assert_array_equal(mirror(array), array[:, ::-1])
    assert mirror(array).flags.writeable and mirror(array).flags.c_contiguous
