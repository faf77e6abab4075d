import numpy as np
import pytest

from jointseg_jax.data.classes import Classes
from jointseg_jax.data.transforms import TRANSFORMS, Flip, Resize, resize_labels
from jointseg_jax.specs import make
from jointseg_jax.types import VOID, UserError


def make_record(height, width, *, seed=0):
    """A record whose image shows the labels: grey value 20 * (label + 1) in the red channel."""
    coarse = np.random.default_rng(seed).integers(VOID, 9, (-(-height // 8), -(-width // 8)))
    labels = np.kron(coarse, np.ones((8, 8)))[:height, :width].astype(np.int16)
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 20 * (labels + 1)
    segments = (labels + 2).astype(np.int32) * 70_000
    return {"id": "a", "image": image, "labels": labels, "captions": (), "segments": segments}


def rng():
    return np.random.default_rng(3)


SIZES = [((40, 56), 32), ((56, 40), (24, 64)), ((9, 33), 48)]


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("source, target", SIZES)
def test_resize_invents_no_label(mode, train, source, target):
    record = make_record(*source)
    out = Resize(size=target, mode=mode)(record, rng(), train)
    shape = (target, target) if isinstance(target, int) else target
    assert out["image"].shape == (*shape, 3) and out["image"].dtype == np.uint8
    assert out["labels"].shape == shape and out["labels"].dtype == np.int16
    assert set(np.unique(out["labels"])) <= set(np.unique(record["labels"]))
    np.testing.assert_array_equal(out["segments"], (out["labels"].astype(np.int32) + 2) * 70_000)


@pytest.mark.parametrize("mode", ["crop", "stretch"])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("source, target", SIZES)
def test_image_and_labels_stay_aligned(mode, scale, source, target):
    rows, columns = np.indices(source, dtype=np.int32)
    image = np.stack([4 * rows, 4 * columns, 0 * rows], -1).astype(np.uint8)
    record = {"id": "a", "image": image, "labels": rows.astype(np.int16), "captions": ()}
    record["segments"] = columns
    resize = Resize(size=target, mode=mode, random_scale=(1.0, scale if mode == "crop" else 1.0))
    out = resize(record, rng(), True)
    # A linear ramp survives resampling away from the border, so the grey level tells the source
    # position c - 1/2, while the label is floor(c): they differ by at most 1/2, and 1/8 for the
    # rounding of the grey level to one part in four of a pixel.
    inner = (out["labels"] > 2) & (out["labels"] < source[0] - 3)
    inner &= (out["segments"] > 2) & (out["segments"] < source[1] - 3)
    assert inner.any()
    assert abs(out["image"][..., 0] / 4 - out["labels"])[inner].max() <= 0.625
    assert abs(out["image"][..., 1] / 4 - out["segments"])[inner].max() <= 0.625


def test_crop_equals_scale_then_crop():
    record = make_record(48, 72)
    out = Resize(size=24)(record, rng(), False)
    # Shorter side 48 -> 24, so 72 -> 36, and the centre crop starts at column 6.
    whole = Resize(size=(24, 36), mode="stretch")(record, rng(), False)
    np.testing.assert_array_equal(out["labels"], whole["labels"][:, 6:30])
    # 1: Pillow rounds filter weights per position; a box start in floating point may flip one.
    assert abs(out["image"].astype(int) - whole["image"][:, 6:30]).max() <= 1


@pytest.mark.parametrize("source", [(48, 113), (113, 48), (50, 50), (640, 427)])
@pytest.mark.parametrize("train", [True, False])
def test_a_square_crop_is_a_square_along_the_longer_side(source, train):
    rows, columns = np.indices(source, dtype=np.int32)
    record = {"id": "a", "image": np.zeros((*source, 3), np.uint8), "captions": ()}
    record |= {"labels": rows.astype(np.int16), "segments": columns}
    short, generator = min(source), rng()
    step = short / 32  # an output pixel in source pixels; all that follows is exact to so much
    starts = set()
    for _ in range(40 if train else 1):
        out = Resize(size=32)(record, generator, train)
        spans = [(int(out[k].min()), int(out[k].max())) for k in ("labels", "segments")]
        for (low, high), length in zip(spans, source):
            # 2: the samples are centres of output pixels, half a pixel inside at both ends, and
            # the scaled length of the longer side is rounded to whole pixels.
            assert abs((high - low + 1) - short) <= 2 * step
            if not train or length == short:
                assert abs((low + high + 1) - length) / 2 <= step
        starts.add(spans[int(np.argmax(source))][0])
    assert (len(starts) > 5) == (train and max(source) > short)


@pytest.mark.parametrize("train", [True, False])
def test_two_to_one_pictures_are_whole_at_half_size(train):
    record = make_record(32, 64)
    wanted = record["labels"][1::2, 1::2]  # centres between two pixels take the later one
    for mode in ("crop", "stretch"):
        out = Resize(size=(16, 32), mode=mode)(record, rng(), train)
        np.testing.assert_array_equal(out["labels"], wanted)


def test_random_scale_shows_a_smaller_part():
    record = make_record(64, 64)
    record["segments"] = np.arange(64 * 64, dtype=np.int32).reshape(64, 64)
    resize = Resize(size=64, random_scale=(2.0, 2.0))
    rows = resize(record, rng(), True)["segments"] // 64
    assert rows.max() - rows.min() in (31, 32)  # 32 rows, in phase with the pixels or not
    still = resize(record, rng(), False)["segments"]
    np.testing.assert_array_equal(still, record["segments"])


def test_crop_positions_vary_in_training_only():
    record = make_record(32, 96)
    record["segments"] = np.tile(np.arange(96, dtype=np.int32), (32, 1))
    resize, generator = Resize(size=32), rng()
    starts = {int(resize(record, generator, True)["segments"][0, 0]) for _ in range(60)}
    assert len(starts) > 20 and min(starts) >= 0 and max(starts) <= 64
    centres = {int(resize(record, generator, False)["segments"][0, 0]) for _ in range(3)}
    assert centres == {32}


def test_the_record_given_is_not_changed():
    record = make_record(40, 40)
    before = {k: np.copy(record[k]) for k in ("image", "labels", "segments")}
    flip = Flip(probability=1.0, swaps=((0, 1),))
    for transform in (Resize(size=40), Resize(size=24), flip):
        transform(record, rng(), True)
    for key, value in before.items():
        np.testing.assert_array_equal(record[key], value)


def test_flip_swaps_left_and_right_classes():
    classes = Classes(names=("sky", "left eye", "right eye"), swaps=((1, 2),))
    labels = np.array([[0, 1, 1], [2, VOID, 0]], np.int16)
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    record = {"id": "a", "image": image, "labels": labels, "captions": ()}
    out = Flip(probability=1.0).for_classes(classes)(record, rng(), True)
    np.testing.assert_array_equal(out["labels"], [[2, 2, 0], [0, VOID, 1]])
    np.testing.assert_array_equal(out["image"], image[:, ::-1])
    kept = Flip(probability=1.0).for_classes(classes)(record, rng(), False)
    np.testing.assert_array_equal(kept["labels"], labels)


def test_flip_rate():
    flip, generator = Flip(probability=0.25), rng()
    record = make_record(8, 16)
    flips = sum(
        not np.array_equal(flip(record, generator, True)["image"], record["image"])
        for _ in range(400)
    )
    # Binomial(400, 1/4) has standard deviation 8.7; 4.5 of them.
    assert abs(flips - 100) < 39


def test_nearest_labels_of_any_dtype():
    labels = np.array([[0, 70_000], [-1, 5]], np.int32)
    out = resize_labels(labels, (4, 4), (0.0, 0.0, 2.0, 2.0))
    np.testing.assert_array_equal(out, np.kron(labels, np.ones((2, 2), np.int32)))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"size": 0}, "size=0 given; both sides need 1 pixel or more"),
        ({"size": 8, "mode": "fit"}, "mode='fit' given; one of: crop, stretch"),
        ({"size": 8, "random_scale": (0.5, 2.0)}, "a scale under 1 would leave the crop partly"),
        ({"size": 8, "mode": "stretch", "random_scale": (1.0, 2.0)}, "scales belong to crops"),
    ],
)
def test_refused_resizes(fields, text):
    with pytest.raises(UserError) as caught:
        make(TRANSFORMS, {"name": "resize", **fields}, where="data.transforms")
    assert text in str(caught.value)


def test_refused_flip():
    with pytest.raises(ValueError, match=r"probability=1.5 given; must lie in \[0, 1\]"):
        Flip(probability=1.5)
