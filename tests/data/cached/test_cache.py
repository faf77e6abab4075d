"""Caches: what is written is read, by any number of hosts, and nothing else."""

import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.cached import shard_writer, texts
from jointseg_jax.data.cached.reader import Cache
from jointseg_jax.data.cached.store import Field, read_index, row_bytes, shard_name
from jointseg_jax.data.cached.views import Views
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.labels import to_content
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.tokenizer import Words
from jointseg_jax.data.transforms import Flip, Resize
from jointseg_jax.perf.bench_cache import reading_rate
from jointseg_jax.types import UserError

READ = ReadConfig()

RECORDS, VARIANTS, PER_SHARD = 11, 4, 4
FIELDS = (
    Field(name="latents/image", dtype="float16", shape=(2, 3, 1)),  # 12 bytes: rows are filled up
    Field(name="labels", dtype="int8", shape=(4, 4)),
    Field(name="image", dtype="uint8", shape=(4, 4, 3)),
    Field(name="clip", dtype="bfloat16", shape=(3,)),
)
WORDS = Words(vocabulary=("first", "of", "second", "word"), length=3)
HEAD = {
    "settings": {"source": {"name": "made"}, "latents": ["image"], "config": {}},
    "classes": to_content(Classes(names=("sky", "road"))),
    "words": list(WORDS.vocabulary),
    "records": RECORDS,
    "crops": 2,
    "flip": 0.25,
    "variants": VARIANTS,
    "fields": [f.plain() for f in FIELDS],
    "text": Field(name="text", dtype="int32", shape=(3,)).plain(),
}
RNG = np.random.default_rng(0)
ROWS = {
    "latents/image": RNG.normal(size=(RECORDS * VARIANTS, 2, 3, 1)).astype(np.float16),
    "labels": RNG.integers(-1, 2, (RECORDS * VARIANTS, 4, 4)).astype(np.int8),
    "image": RNG.integers(0, 256, (RECORDS * VARIANTS, 4, 4, 3)).astype(np.uint8),
    "clip": RNG.normal(size=(RECORDS * VARIANTS, 3)).astype(ml_dtypes.bfloat16),
}
CAPTIONS = [["first word", "second word"][: i % 3] for i in range(RECORDS)]  # none, one, or two
SHARDS = -(-RECORDS // PER_SHARD)


def write_shard(root, number, rows=ROWS):
    first = number * PER_SHARD
    records = range(first, min(first + PER_SHARD, RECORDS))
    name = shard_name("train", number, SHARDS)
    shard = shard_writer.ShardWriter(root, name, FIELDS, len(records) * VARIANTS)
    for index in records:
        place = slice(index * VARIANTS, (index + 1) * VARIANTS)
        note = {"id": f"r{index}", "captions": CAPTIONS[index]}
        shard.add({k: v[place] for k, v in rows.items()}, [note])
    shard.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished cache, to be read only."""
    root = tmp_path_factory.mktemp("caches") / "made"
    shard_writer.begin(root, "train", HEAD)
    for number in range(SHARDS):
        write_shard(root, number)
    shard_writer.finish(root, "train", SHARDS, WORDS.encode)
    return root


@pytest.fixture
def copy(made, tmp_path):
    """A finished cache, to be spoilt."""
    return shutil.copytree(made, tmp_path / "copy")


def opened(root):
    return Cache(root=str(root), split="train")


def read(root, steps, start=0, threads=2, **options):
    options = {"batch": 6, "seed": 3, "transforms": (), "tokenizer": WORDS.encode} | options
    reading = ReadConfig(threads=threads)
    with batches(opened(root), reading, start_step=start, **options) as found:
        return [next(found) for _ in range(steps)]


def same(got, want):
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], strict=True)


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ----------------------------------------------------------------------------- contents


def test_rows_are_read_as_they_were_written(made):
    source, order = opened(made), np.array([10, 0, 4, 4, 7])
    got = source.gather(order)
    assert len(source) == RECORDS and got["labels"].dtype == np.int16
    for name, rows in ROWS.items():
        np.testing.assert_array_equal(got[name], rows[order * VARIANTS])
    ids = np.stack([WORDS.encode((CAPTIONS[i] or [""])[0]) for i in order])
    np.testing.assert_array_equal(got["text"], ids, strict=True)
    assert len(source.texts) == 2 < sum(map(len, CAPTIONS))


@pytest.mark.parametrize(
    ("random", "variant", "caption"),
    [((0, 0, 0), 1, 0), ((0.4, 0.3, 0.49), 0, 0), ((0.5, 0.2, 0.5), 3, 1), ((0.9, 0.9, 0.9), 2, 1)],
)
def test_chances_choose_crop_mirror_and_caption(made, random, variant, caption):
    index = np.array([5])  # a record of two captions
    got = opened(made).gather(index, np.array(random, float)[:, None])
    np.testing.assert_array_equal(got["image"], ROWS["image"][5 * VARIANTS + variant][None])
    np.testing.assert_array_equal(got["text"][0], WORDS.encode(CAPTIONS[5][caption]))


def test_a_record_has_its_id_captions_and_arrays(made):
    record = pickle.loads(pickle.dumps(opened(made)))[9]
    assert (record["id"], record["captions"]) == ("r9", ())
    np.testing.assert_array_equal(record["image"], ROWS["image"][9 * VARIANTS])
    assert list(record["features"]) == ["latents/image", "clip"]
    np.testing.assert_array_equal(
        record["features"]["clip"], ROWS["clip"][9 * VARIANTS].astype(np.float32), strict=True
    )


def test_a_cache_knows_its_source(made):
    source = opened(made)
    assert source.classes == Classes(names=("sky", "road")) and source.words() == WORDS.vocabulary
    assert source.fingerprint()["source"] == {"name": "made"}


# ------------------------------------------------------------------------------ batches


def test_every_epoch_has_every_record_once_in_another_order(made):
    rows = np.concatenate([b["index"] for b in read(made, RECORDS)])  # 11 batches of 6: 6 epochs
    epochs = rows.reshape(6, RECORDS)
    assert all(sorted(epoch) == list(range(RECORDS)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6


def test_the_global_batch_is_the_same_on_any_number_of_hosts(made):
    whole = read(made, 5)
    for hosts in (2, 3):
        parts = [read(made, 5, host=h, hosts=hosts, threads=h + 1) for h in range(hosts)]
        for step in range(5):
            same(joined([part[step] for part in parts]), whole[step])


def test_the_position_is_the_whole_state(made):
    whole = read(made, 6)
    for got, want in zip(read(made, 2, start=4), whole[4:]):
        same(got, want)
    other = read(made, 1, seed=4)[0]
    assert not np.array_equal(other["index"], whole[0]["index"])


def test_draws_have_the_chances_that_were_asked_for(made):
    found = joined(read(made, 200))
    first = ROWS["image"].reshape(RECORDS, VARIANTS, -1)[:, :, 0]
    chosen = [list(first[i]).index(v) for i, v in zip(found["index"], found["image"][:, 0, 0, 0])]
    shares = np.bincount(chosen, minlength=VARIANTS) / len(chosen)
    # 1200 draws: 4 standard deviations of a share of 3/8 are 0.056
    np.testing.assert_allclose(shares, [0.375, 0.125, 0.375, 0.125], atol=0.056)


def test_evaluation_order_takes_the_first_of_each(made):
    got = read(made, 1, train=False)[0]
    np.testing.assert_array_equal(got["image"], ROWS["image"][got["index"] * VARIANTS])


def test_closed_batches_say_so(made):
    with batches(opened(made), READ, batch=2, seed=0, transforms=()) as found:
        assert found.drain() == [] and found.replaced == 0
    with pytest.raises(ValueError, match="these batches are closed"):
        next(found)


def test_the_rate_counts_samples(made):
    with batches(opened(made), READ, batch=4, seed=0, transforms=()) as found:
        rate = reading_rate(found, seconds=0.01, repeats=3)
    assert 0 < rate["slowest"] <= rate["samples_per_second"] <= rate["fastest"]


# ------------------------------------------------------------------------------- damage


def test_every_changed_bit_is_noticed_with_its_file(copy):
    path = copy / f"{shard_name('train', 1, SHARDS)}.bin"
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    rows, sums = PER_SHARD * VARIANTS, 8 * len(FIELDS)
    held = rows * (row_bytes(FIELDS) - sums)
    for byte in rng.choice(held, 25, replace=False):
        spoilt = bytearray(whole)
        spoilt[byte] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        source = opened(copy)
        with pytest.raises(BadSample) as error:
            for variant in range(VARIANTS):
                random = np.array([[variant // 2 / 2], [0.0 if variant % 2 else 0.9], [0.0]])
                source.gather(np.arange(4, 8), np.repeat(random, 4, axis=1))
        assert str(error.value).startswith(f"ERROR [data] {path}: the shard is damaged (")
        assert "delete it and run launch/encode.py again" in str(error.value)


def test_all_damaged_shards_are_listed(made, copy):
    assert opened(made).damage() == []
    for number in (0, 2):
        path = copy / f"{shard_name('train', number, SHARDS)}.bin"
        path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert [p.path[-18:-4] for p in opened(copy).damage()] == ["00000-of-00003", "00002-of-00003"]


def test_the_training_batches_pass_the_complaint_on(copy):
    path = copy / f"{shard_name('train', 0, SHARDS)}.bin"
    path.write_bytes(bytes(path.stat().st_size - 1) + b"\1")
    with pytest.raises(BadSample, match="the shard is damaged"):
        read(copy, RECORDS)


@pytest.mark.parametrize("size", [0, 1, None])
def test_a_shard_of_another_size_is_refused_at_once(copy, size):
    path = copy / f"{shard_name('train', 2, SHARDS)}.bin"
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-size] if size else b"")
    found = "missing" if size is None else r"\d+ bytes"
    with pytest.raises(UserError, match=rf"{path.name}: {found}; \d+ bytes were written") as error:
        opened(copy)
    assert "1 of 6 files of the cache are not as written. Copy it again" in str(error.value)


def test_damaged_tables_are_refused(copy):
    path = copy / "train.text.bin"
    path.write_bytes(b"\7" + path.read_bytes()[1:])
    with pytest.raises(BadSample, match=r"train.text.bin: the table is damaged \(text 0 in it has"):
        opened(copy).gather(np.arange(RECORDS))
    assert [p.path[-14:] for p in opened(copy).damage()] == ["train.text.bin"]
    path = copy / "train.texts.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError, match=r"train.texts.npy: damaged \(another SHA-256"):
        opened(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, "version 1 of the cache; this release reads version 2. Run launch/encode"),
        ({"format": "x"}, "not the index of a cache. Caches are made by launch/encode.py; check"),
        ({"complete": False}, "the cache is not finished. Run the same launch/encode.py command"),
        ({"fields": [{"name": "image"}]}, "train.json: damaged"),
        ({"shards": None}, "train.json: damaged"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(copy, change, said):
    path = copy / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="ERROR") as error:
        opened(copy)
    assert said in str(error.value)


def test_files_outside_the_folder_are_not_opened(copy):
    path = copy / "train.json"
    index = json.loads(path.read_text())
    index["shards"][0]["file"] = "../elsewhere.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(BadSample, match="the name leaves the data set folder"):
        opened(copy)


def test_another_tokenizer_is_refused(made):
    longer, fewer = Words(vocabulary=WORDS.vocabulary, length=4), Words(vocabulary=("a",), length=3)
    for other in (longer, fewer):
        with pytest.raises(UserError, match="token ids of another vocabulary or length"):
            read(made, 1, tokenizer=other.encode)


# ------------------------------------------------------------------------------ writing


def test_a_shard_that_is_not_full_gets_no_name(tmp_path):
    shard = shard_writer.ShardWriter(tmp_path, "x", FIELDS, 3)
    shard.add({k: v[:2] for k, v in ROWS.items()}, [])
    with pytest.raises(ValueError, match="2 of 3 rows were added"):
        shard.close()
    assert not shard_writer.kept(tmp_path, "x") and not (tmp_path / "x.bin").exists()


def test_whole_shards_are_kept_and_others_made_again_to_the_same_bytes(made, copy):
    names = [shard_name("train", n, SHARDS) for n in range(SHARDS)]
    (copy / f"{names[1]}.json").unlink()  # killed between the shard and its note
    (copy / f"{names[2]}.bin").write_bytes(b"short")
    (copy / f"{names[0]}.bin.tmp").write_bytes(b"left over")
    assert [shard_writer.kept(copy, name) for name in names] == [True, False, False]
    shard_writer.begin(copy, "train", HEAD)
    for number in (1, 2):
        write_shard(copy, number)
    shard_writer.finish(copy, "train", SHARDS, WORDS.encode)
    contents = [{p.name: p.read_bytes() for p in root.iterdir()} for root in (made, copy)]
    assert contents[0] == contents[1]


def test_other_settings_are_refused_by_name(copy):
    with pytest.raises(UserError) as error:
        shard_writer.begin(copy, "train", HEAD | {"flip": 0.5, "crops": 1})
    said = (
        "this cache was made with other settings, 2 fields:\n"
        "  crops: 2 -> 1\n  flip: 0.25 -> 0.5\nPut these"
    )
    assert f"train.json: {said} settings back, or choose another --out." in str(error.value)


# --------------------------------------------------------------------- features of text

TEXT = Field(name="text", dtype="float16", shape=(2, 3))
TEXTS = RNG.normal(size=(3, 2, 3)).astype(np.float16)[np.arange(RECORDS) % 3]


def write_with_features(root, shards=range(SHARDS), texts=TEXTS):
    """Shards of one field whose records come with features, of which there are three."""
    (field,) = (f for f in FIELDS if f.name == "clip")
    shard_writer.begin(root, "train", HEAD | {"fields": [field.plain()], "text": TEXT.plain()})
    for number in shards:
        records = range(number * PER_SHARD, min((number + 1) * PER_SHARD, RECORDS))
        name = shard_name("train", number, SHARDS)
        shard = shard_writer.ShardWriter(root, name, [field], len(records) * VARIANTS, TEXT)
        for index in records:
            rows = ROWS["clip"][index * VARIANTS : (index + 1) * VARIANTS]
            shard.add({"clip": rows}, [{"id": str(index), "captions": []}], texts[[index]])
        shard.close()
    return shard_writer.finish(root, "train", SHARDS, None)


def test_features_are_kept_once(tmp_path):
    index, source, order = write_with_features(tmp_path), opened(tmp_path), np.array([10, 0, 4, 4])
    assert index["tables"]["text"]["rows"] == len(source.texts) == 3
    got = source.gather(order, np.full((3, 4), 0.9))["text"]
    np.testing.assert_array_equal(got, TEXTS[order], strict=True)
    np.testing.assert_array_equal(source[7]["features"]["text"], TEXTS[7].astype(np.float32))
    source.check_tokenizer(WORDS.encode)  # there are no token ids
    assert not list(tmp_path.glob("*-of-*.text.bin"))


def test_a_table_of_features_is_made_of_what_there_is(tmp_path):
    index = write_with_features(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert texts.is_whole(tmp_path, index)
    write_with_features(tmp_path, shards=[1])  # the parts of the others are gone
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    other = TEXTS.copy()
    other[5] = 1.0
    assert write_with_features(tmp_path, [1], other)["tables"]["text"]["rows"] == 4
    np.testing.assert_array_equal(opened(tmp_path).gather(np.arange(RECORDS))["text"], other)
    path = tmp_path / "train.text.bin"
    spoilt = bytearray(path.read_bytes())
    spoilt[3 * TEXT.stride] ^= 1  # the text of record 5
    path.write_bytes(spoilt)
    assert not texts.is_whole(tmp_path, read_index(tmp_path / "train.json"))
    name = shard_name("train", 1, SHARDS)
    assert shard_writer.kept(tmp_path, name) and not shard_writer.kept(tmp_path, name, part=True)
    with pytest.raises(UserError, match=r"1 of 4 texts are in no file of the cache any more"):
        write_with_features(tmp_path, [2], other)
    path.write_bytes(spoilt[:-1])  # a size that it cannot have: it is not looked into
    write_with_features(tmp_path, range(SHARDS), other)
    assert opened(tmp_path).damage() == []


# -------------------------------------------------------------------------------- views


def record(width=8):
    image = np.arange(4 * width * 3, dtype=np.uint8).reshape(4, width, 3)
    return {"id": "a", "image": image, "labels": image[..., 0].astype(np.int16) % 2, "captions": ()}


def views(*transforms, crops=0, index=0):
    made = Views(transforms=transforms, crops=crops, seed=0)
    found = list(made.of(record(), index))
    assert len(found) == made.count
    return found


def test_views_are_the_centre_crop_and_its_mirror():
    plain, mirrored = views(Resize(size=4), Flip(probability=0.3, swaps=((0, 1),)))
    want = Resize(size=4)(record(), np.random.default_rng(0), False)
    np.testing.assert_array_equal(plain["image"], want["image"])
    np.testing.assert_array_equal(mirrored["image"], want["image"][:, ::-1])
    np.testing.assert_array_equal(mirrored["labels"], 1 - want["labels"][:, ::-1])


@pytest.mark.parametrize(("probability", "rows"), [(0.0, 1), (1.0, 1), (0.5, 2)])
def test_only_a_flip_that_is_drawn_has_two_views(probability, rows):
    found = views(Flip(probability=probability))
    assert len(found) == rows
    straight = record()["image"][:, :: -1 if probability == 1 else 1]
    np.testing.assert_array_equal(found[0]["image"], straight)


def test_random_crops_belong_to_their_record():
    one, again = (views(Resize(size=4), crops=6) for _ in range(2))
    other = views(Resize(size=4), crops=6, index=1)
    pixels = [[view["image"].tobytes() for view in found] for found in (one, again, other)]
    assert pixels[0] == pixels[1] != pixels[2] and len(set(pixels[0])) > 1


def test_validation_has_the_view_that_evaluation_reads():
    chain = (Resize(size=4), Flip(probability=1.0))
    (view,) = Views(transforms=chain, crops=0, seed=0, train=False).of(record(), 0)
    np.testing.assert_array_equal(view["image"], views(Resize(size=4))[0]["image"])
    with pytest.raises(UserError, match="crops=2: validation reads the centre's; leave --crops"):
        Views(transforms=chain, crops=2, seed=0, train=False)


def test_two_flips_are_refused():
    with pytest.raises(UserError, match="more than one flip; leave one in"):
        views(Flip(), Flip())
