"""Absorbing small regions: the original algorithm exactly, and the laws of both modes."""

import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from jointseg_jax.annotations import masks

BACKGROUND = 0
SQUARE = np.ones((3, 3), bool)


def naive(labels, tau):
    """The original algorithm step by step over whole images, and which regions it excused.

    Excused pixels belong to a region that, at its turn, kept its label (its ring said so), or took
    one that it touches across a corner only: such a region may stay smaller than ``tau``.
    """
    labels, excused = labels.copy(), np.zeros(labels.shape, bool)
    for label in [value for value in np.unique(labels) if value != BACKGROUND]:
        regions, count = ndimage.label(labels == label)
        for number in range(1, count + 1):
            region = regions == number
            ring = ndimage.binary_dilation(region, SQUARE) & ~region
            if region.sum() >= tau or not ring.any():
                continue
            values, votes = np.unique(labels[ring], return_counts=True)
            winner = values[votes.argmax()]  # unique is ascending: ties go to the smallest
            edge = ndimage.binary_dilation(region) & ~region
            if winner == label or not (labels[edge] == winner).any():
                excused |= region
            labels[region] = winner
    return labels, excused


def regions_of(labels):
    """Every 4-connected region as (label, boolean map)."""
    for label in np.unique(labels):
        numbered, count = ndimage.label(labels == label)
        for number in range(1, count + 1):
            yield label, numbered == number


def sequential(labels, tau, sweep, frozen=masks.NONE):
    ranked = masks._ranked(labels)
    masks.sequential(ranked, tau, ranked.void if frozen == "void" else masks.NONE, sweep)
    return ranked.values[ranked.ranks].astype(labels.dtype)


@st.composite
def label_maps(draw):
    """Small maps of every kind: noise, blobs, thin lines, with labels 0, 255 and gaps."""
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    values = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 254, 255]), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.integers(1, 4))
    coarse = rng.integers(len(values), size=(-(-height // grain), -(-width // grain)))
    fine = np.kron(coarse, np.ones((grain, grain), int))[:height, :width]
    noise = rng.random(fine.shape) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    fine = np.where(noise, rng.integers(len(values), size=fine.shape), fine)
    return np.asarray(values, np.uint8)[fine]


AREAS = st.integers(0, 30)


@pytest.mark.thorough
@settings(max_examples=150, deadline=None)
@given(label_maps(), AREAS)
def test_sequential_is_the_original_pixel_for_pixel(labels, tau):
    want, _ = naive(labels, tau)
    np.testing.assert_array_equal(masks.absorb(labels, tau), want)
    np.testing.assert_array_equal(sequential(labels, tau, masks.sweep_crops), want)
    np.testing.assert_array_equal(sequential(labels, tau, masks.compiled()), want)
    # what numba compiles, as plain Python: tested where numba is not installed, too
    np.testing.assert_array_equal(sequential(labels, tau, masks.sweep_pixels), want)


@settings(max_examples=80, deadline=None)
@given(label_maps(), AREAS)
def test_only_the_chosen_regions_change(labels, tau):
    chosen = labels > 2
    got = masks.absorb(labels, tau, mode="fast", only=chosen)
    np.testing.assert_array_equal(got[~chosen], labels[~chosen])
    everything = masks.absorb(labels, tau, mode="fast", only=np.ones(labels.shape, bool))
    np.testing.assert_array_equal(everything, masks.absorb(labels, tau, mode="fast"))
    small = [r for v, r in regions_of(got) if v > 2 and r.sum() < tau]
    large = [r for v, r in regions_of(labels) if v <= 2 or r.sum() >= tau]
    assert not small or not large  # left over only where there is nothing to merge with


def test_only_belongs_to_fast_mode():
    with pytest.raises(ValueError, match=r"only of shape \(2, 2\) given with mode='sequential'"):
        masks.absorb(np.zeros((2, 2), int), 2, only=np.ones((2, 2), bool))


def scattered(size=512, classes=21):
    """Large blobs under small regions, about 1,000 of these on 512 x 512 pixels."""
    rng = np.random.default_rng(0)
    field = rng.standard_normal((classes, size, size))
    labels = ndimage.gaussian_filter(field, (0, size / 20, size / 20)).argmax(0).astype(np.uint8)
    for y, x, height, width in rng.integers(1, [size, size, 7, 7], size=(size * 3 // 2, 4)):
        labels[y : y + height, x : x + width] = rng.choice([*range(classes), 255])
    return labels


@pytest.mark.thorough
def test_the_sweeps_agree_on_a_large_map():
    labels = scattered(256)
    want = sequential(labels, 50, masks.sweep_crops)
    np.testing.assert_array_equal(masks.absorb(labels, 50), want)
    assert (want != labels).sum() > 1000


def test_without_numba_the_result_is_the_same(monkeypatch):
    labels = scattered(64)
    usual = masks.absorb(labels, 20)
    masks.compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)  # an import of it now fails
    try:
        assert masks.compiled() is None
        np.testing.assert_array_equal(masks.absorb(labels, 20), usual)
    finally:
        masks.compiled.cache_clear()


@pytest.mark.thorough
def test_fast_mode_is_fast():
    """512 x 512 with about 1,000 regions in 50 ms of one core (best of 5), on a slow one in 200."""
    labels = scattered()
    assert 800 < sum(1 for _ in regions_of(labels)) < 1600
    times = []
    for _ in range(5):
        start = time.process_time()
        masks.absorb(labels, 50, mode="fast")
        times.append(time.process_time() - start)
    assert min(times) <= 0.2, times


@pytest.mark.parametrize("mode", ["sequential", "fast"])
def test_ids_of_any_size(mode):
    small = scattered(48, classes=6)
    ids = np.array([0, 7, 70_000, 2**31, 2**40, 2**41])

    def renamed(labels):
        return np.where(labels == 255, -1, ids[np.where(labels == 255, 0, labels)])

    want = renamed(masks.absorb(small, 30, mode=mode))
    np.testing.assert_array_equal(masks.absorb(renamed(small), 30, mode=mode), want)


@settings(max_examples=100, deadline=None)
@given(label_maps(), AREAS)
def test_sequential_laws(labels, tau):
    """1. A small region of another label than 0 stays only if it is, or holds, an excused one.
    2. Pixels of label 0 and of regions of ``tau`` pixels or more never change. 3. No new labels.
    4. A map without small regions is a fixed point."""
    got, (_, excused) = masks.absorb(labels, tau), naive(labels, tau)
    for label, region in regions_of(got):
        whole_map = region.all()
        if label != BACKGROUND and region.sum() < tau and not whole_map:
            assert excused[region].any()
    for label, region in regions_of(labels):
        if label == BACKGROUND or region.sum() >= tau:
            assert (got[region] == label).all()
    assert set(np.unique(got)) <= set(np.unique(labels)) and got.dtype == labels.dtype
    if all(region.sum() >= tau or label == BACKGROUND for label, region in regions_of(got)):
        np.testing.assert_array_equal(masks.absorb(got, tau), got)


@settings(max_examples=100, deadline=None)
@given(label_maps(), AREAS)
def test_fast_laws(labels, tau):
    """1. No region below ``tau`` stays, of any label, unless the map has none of ``tau`` pixels:
    then nothing changes. 2. Regions of ``tau`` pixels or more never change. 3. No new labels.
    4. Idempotent. 5. It commutes with flips and rotations."""
    got = masks.absorb(labels, tau, mode="fast")
    large = [(label, region) for label, region in regions_of(labels) if region.sum() >= tau]
    if not large:
        np.testing.assert_array_equal(got, labels)
    else:
        assert min(region.sum() for _, region in regions_of(got)) >= tau
    for label, region in large:
        assert (got[region] == label).all()
    assert set(np.unique(got)) <= set(np.unique(labels)) and got.dtype == labels.dtype
    np.testing.assert_array_equal(masks.absorb(got, tau, mode="fast"), got)
    for turn in (np.fliplr, np.flipud, np.transpose, np.rot90):
        turned = masks.absorb(np.ascontiguousarray(turn(labels)), tau, mode="fast")
        np.testing.assert_array_equal(turned, turn(got))


@settings(max_examples=100, deadline=None)
@given(label_maps(), AREAS, st.sampled_from(["sequential", "fast"]))
def test_void_is_the_last_label_or_kept(labels, tau, mode):
    """VOID = -1 in signed maps does what 255 does in files; kept, it neither changes nor grows."""
    void = labels == 255
    signed = np.where(void, -1, labels.astype(np.int16)).astype(np.int16)
    got = masks.absorb(labels, tau, mode=mode)
    want = np.where(got == 255, -1, got.astype(np.int16))
    np.testing.assert_array_equal(masks.absorb(signed, tau, mode=mode), want)
    kept = masks.absorb(signed, tau, mode=mode, keep_void=True)
    np.testing.assert_array_equal(kept == -1, void)
    for sweep in (masks.sweep_crops, masks.compiled()):
        if mode == "sequential":
            np.testing.assert_array_equal(sequential(signed, tau, sweep, frozen="void"), kept)


def test_what_the_modes_do_differently():
    island = np.ones((9, 9), np.uint8)
    island[4, 4] = 0
    np.testing.assert_array_equal(masks.absorb(island, 20), island)  # background stays
    assert (masks.absorb(island, 20, mode="fast") == 1).all()  # background is filled
    # the ring holds three pixels of label 3 and three of label 5, whose region is the larger
    tie = np.array([[5, 5, 5, 9, 3, 3]] * 3, np.uint8)
    assert (masks.absorb(tie, 4)[:, 3] == 3).all()  # the smallest label
    assert (masks.absorb(tie, 4, mode="fast")[:, 3] == 5).all()  # the larger region


def test_strictly_smaller_and_single_region_maps():
    labels = np.zeros((20, 20), np.uint8)
    labels[2:6, 2:7] = 4  # 20 pixels
    for mode in ("sequential", "fast"):
        np.testing.assert_array_equal(masks.absorb(labels, 20, mode=mode), labels)
        assert not masks.absorb(labels, 21, mode=mode).any()
        small = np.full((3, 3), 7, np.uint8)  # the original stops here with an error
        np.testing.assert_array_equal(masks.absorb(small, 100, mode=mode), small)
        assert masks.absorb(np.zeros((0, 5), np.int16), 9, mode=mode).shape == (0, 5)


def test_the_input_is_not_written_to():
    labels = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
    before = labels.copy()
    labels.setflags(write=False)
    for mode in ("sequential", "fast"):
        masks.absorb(labels, 9, mode=mode)
        masks.absorb(np.asfortranarray(labels), 9, mode=mode)
    np.testing.assert_array_equal(labels, before)
    np.testing.assert_array_equal(
        masks.absorb(labels.astype(np.int32), 9), masks.absorb(labels, 9).astype(np.int32)
    )


def test_bad_arguments_are_named():
    labels = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="tau=-1"):
        masks.absorb(labels, -1)
    with pytest.raises(ValueError, match="one of: sequential, fast"):
        masks._check(labels, 1, "slow")
    with pytest.raises(ValueError, match="a float64 array"):
        masks._check(np.zeros((4, 4)), 1, "fast")
    with pytest.raises(ValueError, match="width=0"):
        masks.boundary(labels, 0)


@settings(max_examples=50, deadline=None)
@given(label_maps(), st.integers(1, 4))
def test_boundary_is_every_pixel_near_another_label(labels, width):
    got = masks.boundary(labels, width)
    for y, x in np.ndindex(labels.shape):
        near = labels[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
        assert got[y, x] == (near != labels[y, x]).any() or got[y, x] == (len(np.unique(near)) > 1)
    stack = np.stack([labels, np.zeros_like(labels)])
    batch = masks.boundary(stack, width)
    np.testing.assert_array_equal(batch[0], got)
    assert not batch[1].any()
