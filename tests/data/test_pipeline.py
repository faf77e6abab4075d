import dataclasses
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.pipeline import batches, evaluation_batches
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.data.tokenizer import Words
from jointseg_jax.data.transforms import Flip, Resize
from jointseg_jax.types import UserError

READ = ReadConfig()

TRANSFORMS = (Resize(size=16, random_scale=(1.0, 1.5)), Flip())
SOURCE = Scenes(size=24, count=10)


class Spoilt:
    """The scenes with some of them unreadable; notes whether anyone writes into its records."""

    def __init__(self, bad, count=10):
        self.inner = Scenes(size=16, count=count)
        self.bad = set(bad)
        self.name, self.classes = "spoilt", self.inner.classes

    def __len__(self):
        return len(self.inner)

    def words(self):
        return self.inner.words()

    def fingerprint(self):
        return self.inner.fingerprint()

    @functools.lru_cache  # noqa: B019 - a shared record, so that a write into it would be seen
    def good(self, index):
        record = self.inner[index]
        for key in ("image", "labels", "segments"):
            record[key].setflags(write=False)
        return {**record, "captions": ("first", "second", "third")}

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"images/{index}.jpg", "truncated", "a whole JPEG", "Copy it again.")
        return self.good(index)


WORDS = Words(vocabulary=tuple(sorted({*SOURCE.words(), "first", "second", "third"})), length=24)


def read(steps, source=SOURCE, **options):
    options = {
        "batch": 4,
        "seed": 1,
        "transforms": TRANSFORMS,
        "tokenizer": WORDS.encode,
        **options,
    }
    names = {f.name for f in dataclasses.fields(ReadConfig)} & options.keys()
    reading = ReadConfig(**{name: options.pop(name) for name in names})
    with batches(source, reading, **options) as stream:
        return list(itertools.islice(stream, steps))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_what_a_batch_holds():
    (batch,) = read(1)
    assert {k: (v.shape, v.dtype.str) for k, v in batch.items()} == {
        "image": ((4, 16, 16, 3), "|u1"),
        "labels": ((4, 16, 16), "<i2"),
        "text": ((4, 24), "<i4"),
        "index": ((4,), "<i8"),
    }
    assert "text" not in read(1, tokenizer=None)[0]


def test_features_become_fields():
    source = Spoilt(())
    plain = source.good
    source.good = lambda i: {**plain(i), "features": {"clip": np.full(3, i, np.float32)}}
    (batch,) = read(1, source, tokenizer=None)
    np.testing.assert_array_equal(batch["clip"], batch["index"][:, None].repeat(3, 1))
    assert batch["clip"].dtype == np.float32 and "features" not in batch


def test_panoptic_batches_number_the_instances_of_their_own_crop():
    (batch,) = read(1, instances=3)
    assert batch["panoptic"].dtype == np.int16 and batch["panoptic"].shape == (4, 16, 16, 2)
    np.testing.assert_array_equal(batch["panoptic"][..., 0], batch["labels"])
    for labels, numbers in zip(batch["labels"], batch["panoptic"][..., 1]):
        assert not numbers[labels < 5].any()  # the first five classes are stuff
        assert set(np.unique(numbers)) - {0} == set(range(1, numbers.max() + 1))
    assert "panoptic" not in read(1)[0]
    with evaluation_batches(SOURCE, READ, batch=5, transforms=(), instances=255) as stream:
        whole = next(stream)
    for index, numbers in enumerate(whole["panoptic"][..., 1]):
        segments = SOURCE[index]["segments"]
        np.testing.assert_array_equal(numbers > 0, segments > 0)
        pairs = {*zip(segments.ravel().tolist(), numbers.ravel().tolist())}
        assert len(pairs) == len(np.unique(segments))  # the same instances by other names


def test_panoptic_batches_need_segments():
    source = Spoilt(())
    plain = source.good
    source.good = lambda i: {k: v for k, v in plain(i).items() if k != "segments"}
    with pytest.raises(UserError, match=r"has no segments, and config\.data\.panoptic asks for"):
        read(1, source, instances=255)
    assert "panoptic" not in read(1, source)[0]


def test_every_epoch_is_another_whole_permutation():
    order = np.concatenate([b["index"] for b in read(15)])  # 60 rows = 6 epochs of 10
    epochs = [tuple(epoch) for epoch in order.reshape(6, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_augmentation_differs_between_epochs_and_rows():
    rows = {}
    for batch in read(10):
        for index, image in zip(batch["index"], batch["image"]):
            rows.setdefault(int(index), []).append(image.tobytes())
    assert all(len(set(views)) == len(views) == 4 for views in rows.values())


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("start", [1, 3, 7])
def test_resuming_is_starting_at_the_step(start):
    whole = read(9)
    assert_same(read(9 - start, start_step=start), whole[start:])


def test_the_step_is_counted():
    with batches(SOURCE, READ, batch=4, seed=0, transforms=TRANSFORMS, start_step=5) as stream:
        next(stream), next(stream)
        assert stream.step == 7


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_global_batch(hosts):
    parts = [read(5, host=host, hosts=hosts) for host in range(hosts)]
    joined = [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*parts)]
    assert_same(joined, read(5))


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 9, "prefetch": 1}])
def test_threads_change_nothing(options):
    assert_same(read(5, **options), read(5))


def test_closed_batches_say_so():
    with batches(SOURCE, READ, batch=2, seed=0, transforms=TRANSFORMS) as stream:
        next(stream)
    stream.close()  # twice does no harm
    with pytest.raises(ValueError, match=r"closed; make new ones with start_step=step"):
        next(stream)


def test_seeds_change_order_and_augmentation():
    assert not np.array_equal(read(1)[0]["index"], read(1, seed=2)[0]["index"])
    # Seed + 1 must not be the same stream one epoch later.
    later = np.concatenate([b["index"] for b in read(5, batch=2, start_step=5)])
    other = np.concatenate([b["index"] for b in read(5, batch=2, seed=2)])
    assert not np.array_equal(later, other)


def test_without_training_there_is_no_augmentation():
    for batch in read(3, train=False, transforms=(Resize(size=24), Flip(probability=1.0))):
        for index, image in zip(batch["index"], batch["image"]):
            np.testing.assert_array_equal(image, SOURCE[int(index)]["image"])


def test_captions_are_drawn_in_training_and_first_otherwise():
    drawn = {WORDS.decode(t) for b in read(6, Spoilt(())) for t in b["text"]}
    assert drawn == {"first", "second", "third"}
    options = {"batch": 4, "transforms": TRANSFORMS, "tokenizer": WORDS.encode}
    with evaluation_batches(Spoilt(()), READ, **options) as stream:
        texts = {WORDS.decode(t) for b in stream for t in b["text"]}
    assert texts == {"first"}


ORPHANS = """
import os, time
from jointseg_jax.config import ReadConfig
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.sources.scenes import Scenes

if __name__ == "__main__":
    reading = ReadConfig(workers=2)
    stream = batches(Scenes(size=64, count=9), reading, batch=8, seed=0, transforms=())
    next(stream), next(stream)
    print("ready", flush=True)
    time.sleep(60)
"""


def children(pid):
    """Lists the processes whose parent is ``pid``, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="lists processes through /proc")
def test_no_worker_outlives_a_killed_run(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(ORPHANS)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    assert run.stdout.readline() == b"ready\n"
    workers = children(run.pid)
    assert len(workers) >= 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))


def test_bad_samples_are_replaced_by_their_neighbour_and_reported():
    options = {"batch": 5, "seed": 1, "transforms": ()}
    with batches(Spoilt({3, 4}), READ, **options) as stream:
        spoilt = list(itertools.islice(stream, 4))
        reports, again = stream.drain(), stream.drain()
        assert stream.replaced == 4  # two bad samples in each of two epochs
    whole = read(4, Spoilt(()), batch=5, transforms=(), tokenizer=None)
    expected = [np.where(np.isin(b["index"], (3, 4)), 5, b["index"]) for b in whole]
    np.testing.assert_array_equal([b["index"] for b in spoilt], expected)
    assert again == [] and sorted((r["index"], r["replaced_by"]) for r in reports) == [
        (3, 5),
        (4, 5),
    ]
    for report in reports:
        assert report["error"] == (
            f"ERROR [data] images/{report['index']}.jpg: truncated; a whole JPEG. Copy it again."
        )
        assert {3, 4} & set(whole[report["step"]]["index"])


def test_the_last_record_is_replaced_by_the_first():
    batch = read(1, Spoilt({9}), batch=10, transforms=(), tokenizer=None)[0]
    assert sorted(batch["index"]) == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_bad_samples_stop_when_told():
    with pytest.raises(BadSample, match=r"images/3.jpg: truncated; a whole JPEG. Copy it again."):
        read(3, Spoilt({3}), bad="stop", transforms=())


def test_too_many_bad_samples_stop():
    text = (
        "3 different bad samples, more than the limit of 2. Run launch/prepare.py to list them all"
    )
    with pytest.raises(UserError, match=re.escape(text)):
        read(9, Spoilt({1, 3, 5}), bad_limit=2, transforms=())
    assert len(read(9, Spoilt({1, 3, 5}), bad_limit=3, transforms=())) == 9


def test_nothing_but_bad_samples():
    with pytest.raises(UserError, match="none of its 10 samples can be used; the first: ERR"):
        read(1, Spoilt(range(10)), transforms=())


def test_labels_out_of_range_are_bad_samples():
    source = Spoilt(())
    wrong = np.full((16, 16), 77, np.int16)
    source.good = lambda index: {**source.inner[index], "labels": wrong}
    with pytest.raises(BadSample, match=r"labels 77 \(256 px\) out of range"):
        read(1, source, bad="stop", transforms=())


def test_evaluation_sees_every_record_once_in_order():
    options = {"batch": 4, "transforms": (Resize(size=24),), "tokenizer": WORDS.encode}
    with evaluation_batches(SOURCE, READ, **options) as stream:
        seen = list(stream)
    assert [b["index"].tolist() for b in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 9, 9]]
    assert [b["valid"].tolist() for b in seen][-1] == [True, True, False, False]
    assert all(b["valid"].all() for b in seen[:-1])
    for batch in seen:
        for index, image in zip(batch["index"], batch["image"]):
            np.testing.assert_array_equal(image, SOURCE[int(index)]["image"])
    halves = []
    for host in (0, 1):
        with evaluation_batches(SOURCE, READ, host=host, hosts=2, **options) as stream:
            halves.append(list(stream))
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves)]
    assert_same(joined, seen)


def test_evaluation_leaves_out_bad_samples_and_stops_at_the_limit():
    with evaluation_batches(Spoilt({1, 6}), READ, batch=4, transforms=(), limit=7) as stream:
        seen = list(stream)
        reports = stream.drain()
    valid = np.concatenate([b["valid"] for b in seen])
    index = np.concatenate([b["index"] for b in seen])
    assert index[valid].tolist() == [0, 2, 3, 4, 5] and len(seen) == 2
    assert [r["index"] for r in reports] == [1, 6]


def test_fewer_records_than_a_batch_repeat():
    index = read(1, Spoilt((), count=3), batch=8, transforms=(), tokenizer=None)[0]["index"]
    assert sorted(index[:3]) == sorted(index[3:6]) == [0, 1, 2]


def test_an_empty_source_is_refused():
    source = Spoilt(())
    source.inner = ()
    with pytest.raises(UserError, match="spoilt: has 0 samples; between 1 and"):
        read(1, source)


def test_sizes_that_cannot_share_a_batch():
    source = Spoilt(())
    source.__class__ = Uneven
    with pytest.raises(UserError, match=r"Add a resize to config\.data\.transforms"):
        read(1, source, transforms=())


class Uneven(Spoilt):
    def __getitem__(self, index):
        return Scenes(size=16 + index, count=10)[index]


@pytest.mark.parametrize(
    "options, text",
    [
        ({"batch": 3, "hosts": 2}, "batch=3 over hosts=2 (this is host 0): every host must make"),
        ({"host": 2, "hosts": 2}, "this is host 2"),
    ],
)
def test_refused_hosts(options, text):
    with pytest.raises(UserError, match=re.escape(text)):
        read(1, **options)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"bad": "skip"}, "config.data.bad = 'skip': one of: replace, stop."),
        ({"seed": -1}, "seed=-1 given; must be 0 or more"),
        ({"workers": -1}, "config.data.workers = -1: must be a whole number, 0 or more"),
        ({"start_step": -1}, "start_step=-1 given"),
    ],
)
def test_refused_options(options, text):
    with pytest.raises((ValueError, UserError), match=re.escape(text)):
        read(1, **options)
