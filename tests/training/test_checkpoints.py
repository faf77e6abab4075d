"""A checkpoint is restored bit for bit or not used: every kind of damage is noticed and named."""

import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jointseg_jax import settings_diff
from jointseg_jax.training.checkpoints import Checkpoints, SaveError, read_meta
from jointseg_jax.training.digest import state_digest
from jointseg_jax.types import UserError

# TensorStore tells an event loop that is gone of reads that a failure left behind
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"data": {"batch": 16, "name": "scenes"}, "steps": 100, "betas": (0.9, 0.95)}


def state_of(step):
    """A state with every kind of leaf; random floats, so that the files do not compress."""
    rng = np.random.default_rng(step)
    weights = jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
    return {
        "params": {"dense": {"kernel": weights, "bias": weights[0].astype(jnp.bfloat16)}},
        "ema": {"dense": {"kernel": weights + 1, "bias": weights[1]}},
        "opt": [weights * 2, (jnp.int32(step), jnp.zeros((0, 4)))],
        "flags": jnp.asarray([True, False, True]),
        "small": jnp.arange(-4, 4, dtype=jnp.int8),
        "key": jax.random.split(jax.random.key(step), 3),
        "step": jnp.int32(step),
    }


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("written") / "c"
    with Checkpoints(folder, keep=5) as checkpoints:
        for step in (10, 20, 30):
            assert checkpoints.save(step, state_of(step), {"config": CONFIG})
    return folder


@pytest.fixture
def run(written, tmp_path):
    """A copy of it."""
    return shutil.copytree(written, tmp_path / "c")


def restored(folder, **options):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_newest(abstract(state_of(0)), **options)


def assert_restored(result, step):
    state, meta = result
    assert meta["step"] == step
    assert state_digest(state) == state_digest(state_of(step))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.shape == b.shape, state, state_of(0))
    assert all(jax.tree.leaves(same))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_restores_every_kind_of_leaf_bit_for_bit(run):
    state, meta = restored(run)
    assert_restored((state, meta), 30)
    assert meta["config"] == json.loads(json.dumps(CONFIG))
    assert meta["checkpoint"]["digest"] == state_digest(state_of(30))
    assert jax.random.key_impl(state["key"]) == jax.random.key_impl(jax.random.key(0))
    draws = jax.vmap(jax.random.bits)(state["key"])
    np.testing.assert_array_equal(draws, jax.vmap(jax.random.bits)(state_of(30)["key"]))


def test_nothing_there_is_none(tmp_path):
    assert restored(tmp_path / "new") is None


def test_keeps_the_newest_and_every_nth(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=30) as checkpoints:
        for step in (10, 20, 30, 40, 50):
            checkpoints.save(step, {"x": jnp.float32(step)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [30, 40, 50]
        assert checkpoints.save(50, {"x": jnp.float32(0)}, {}) is False


@pytest.mark.parametrize("async_", [True, False])
def test_a_new_manager_finds_what_the_last_one_wrote(tmp_path, async_):
    with Checkpoints(tmp_path, async_=async_) as checkpoints:
        checkpoints.save(1, state_of(1), {})
    assert_restored(restored(tmp_path), 1)


# --- damage (F11, F12)


@pytest.mark.thorough
@pytest.mark.parametrize("flips", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_flipped_bits_are_noticed(run, caplog, flips):  # F11
    rng = np.random.default_rng(0)
    whole = run.parent / "whole"
    shutil.copytree(run, whole)
    noticed = 0
    for _ in range(flips):
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        path = largest_file(run / "30" / "state")
        data = bytearray(path.read_bytes())
        # the middle of the largest file is array data: index and manifest lie at the ends
        position = int(rng.integers(len(data) // 10, len(data) * 9 // 10))
        data[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        assert_restored(restored(run), 20)
        noticed += any(p.name.startswith("30.damaged-") for p in run.iterdir())
    assert noticed == flips
    assert caplog.text.count("30 is damaged") == flips


def damage_truncated(folder):
    path = largest_file(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_array_file_missing(folder):
    largest_file(folder / "state").unlink()


def damage_manifest_missing(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def damage_state_missing(folder):
    shutil.rmtree(folder / "state")


def damage_meta_missing(folder):
    shutil.rmtree(folder / "meta")


def damage_meta_garbage(folder):
    (folder / "meta" / "metadata").write_text('{"step": 30, \x00garbage')


def damage_meta_edited(folder):
    path = folder / "meta" / "metadata"
    path.write_text(path.read_text().replace('"batch": 16', '"batch": 32'))


def damage_emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_marker_missing(folder):
    (folder / "commit_success.txt").unlink()


DAMAGES = {
    damage_truncated: "unreadable",
    damage_array_file_missing: "unreadable",
    damage_manifest_missing: "unreadable",
    damage_state_missing: "unreadable",
    damage_meta_missing: "metadata",
    damage_meta_garbage: "metadata",
    damage_meta_edited: "metadata",
    damage_emptied: "empty",
    damage_marker_missing: "uncommitted",
}


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_falls_back_renames_and_says_so_in_one_line(run, caplog, damage):
    damage(run / "30")
    cause = DAMAGES[damage]
    assert_restored(restored(run), 20)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("jointseg_jax")]
    assert len(lines) == 1 and "\n" not in lines[0]
    assert str(run / "30") in lines[0] and f"renamed 30.damaged-{cause}" in lines[0]
    assert (run / f"30.damaged-{cause}").is_dir() and not (run / "30").exists()
    caplog.clear()
    assert_restored(restored(run), 20)  # the second start is silent
    assert not [r for r in caplog.records if r.name.startswith("jointseg_jax")]


def test_an_array_that_the_files_lack_is_damage(run, tmp_path):
    with Checkpoints(tmp_path / "less") as checkpoints:
        checkpoints.save(30, {k: v for k, v in state_of(30).items() if k != "small"}, {})
    shutil.rmtree(run / "30" / "state")
    shutil.copytree(tmp_path / "less" / "30" / "state", run / "30" / "state")
    assert_restored(restored(run), 20)
    assert (run / "30.damaged-digest").is_dir()


@pytest.mark.thorough
def test_training_goes_on_past_a_damaged_step(run):
    damage_truncated(run / "30")
    with Checkpoints(run) as checkpoints:
        assert_restored(checkpoints.restore_newest(abstract(state_of(0))), 20)
        assert checkpoints.save(30, state_of(30), {"config": CONFIG})
    damage_truncated(run / "30")
    assert_restored(restored(run), 20)
    names = {p.name for p in run.iterdir()}
    assert {"30.damaged-unreadable", "30.damaged-unreadable.2"} <= names


@pytest.mark.thorough
def test_all_damaged_stops_until_told_to_start_afresh(run, caplog):
    for step in (10, 20, 30):
        damage_truncated(run / str(step))
    for _ in range(2):  # also when the folders have been renamed by the first try
        with pytest.raises(UserError) as error:
            restored(run)
        text = str(error.value)
        assert all(f"{n}.damaged-unreadable" in text for n in (10, 20, 30))
        assert "train with --start_afresh" in text and "another --workdir" in text
    assert len([r for r in caplog.records if r.name.startswith("jointseg_jax")]) == 3
    assert restored(run, start_afresh=True) is None


def test_an_interrupted_write_is_removed_and_is_no_damage(tmp_path, caplog):
    folder = tmp_path / "7"
    (folder / "state").mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").write_text('{"init_timestamp_nsecs": 1}')
    assert restored(tmp_path) is None
    assert not folder.exists() and "interrupted" in caplog.text


def test_a_reader_touches_nothing(run, caplog):
    damage_truncated(run / "30")
    (run / "40").mkdir()
    before = sorted(p.name for p in run.iterdir())
    reader = Checkpoints(run, read_only=True)
    assert_restored(reader.restore_newest(abstract(state_of(0))), 20)
    assert sorted(p.name for p in run.iterdir()) == before
    assert "left as it is" in caplog.text
    with pytest.raises(ValueError, match="read_only"):
        reader.save(50, state_of(50), {})


def test_lack_of_memory_is_not_damage(run, monkeypatch):
    import orbax.checkpoint as ocp

    def restore(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(RuntimeError, match="Out of memory"):
        restored(run)
    assert (run / "30").is_dir()


# --- what fits and what does not (F13, F14)


def test_restores_onto_another_mesh_bit_equal(tmp_path):
    def mesh(rows, columns):
        return Mesh(np.array(jax.devices()[: rows * columns]).reshape(rows, columns), ("a", "b"))

    def lay(tree, mesh, spec):
        whole, cut = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((), spec))
        return jax.tree.map(lambda x: cut if x.ndim == 2 and x.size else whole, tree)

    state = state_of(3)
    placed = jax.device_put(state, lay(state, mesh(4, 2), ("a", "b")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, placed, {})
    for shape, spec in (
        ((2, 4), ("b", "a")),
        ((8, 1), ("a",)),
        ((1, 1), ()),
        ((1, 4), (None, "b")),
    ):
        shardings = lay(state, mesh(*shape), spec)
        wanted = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore_newest(wanted)
        assert_restored(found, 3)
        as_asked = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found[0], shardings
        )
        assert all(jax.tree.leaves(as_asked))


@pytest.mark.thorough_but(2)
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda s: s["params"]["dense"].update(kernel=jnp.zeros((64, 256))),
            "float32[64,256] wanted",
        ),
        (lambda s: s.update(step=jnp.float32(0)), "step: int32[] saved, float32[] wanted"),
        (lambda s: s["ema"]["dense"].update(kernel=jnp.zeros((64, 128), jnp.bfloat16)), "bfloat16"),
        (lambda s: s["params"].update(extra=jnp.zeros(3)), "params/extra: absent saved"),
        (lambda s: s.pop("flags"), "flags: bool[3] saved, absent wanted"),
        (lambda s: s.update(key=jax.random.split(jax.random.key(0, impl="rbg"), 3)), "key<rbg>[3]"),
    ],
)
def test_another_model_is_refused_and_not_taken_for_damage(run, change, line):
    wanted = state_of(0)
    change(wanted)
    with Checkpoints(run) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore_newest(abstract(wanted))
    assert line in str(error.value) and "1 arrays differ" in str(error.value)
    assert (run / "30").is_dir()


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("data/batch", 32, "data/batch: 16 -> 32"),
        ("data/name", "voc", 'data/name: "scenes" -> "voc"'),
        ("seed", 1, "seed: (absent) -> 1"),
        ("betas", (0.9, 0.99), "betas: [0.9, 0.95] -> [0.9, 0.99]"),
    ],
)
def test_changed_settings_are_refused_field_by_field(run, key, value, text):
    current = json.loads(json.dumps(CONFIG))
    node, *rest = key.split("/")
    if rest:
        current[node][rest[0]] = value
    else:
        current[node] = value

    def accept(meta):
        settings_diff.require_same(meta["config"], current, ["^steps$"], where="checkpoint")

    with pytest.raises(UserError) as error:
        restored(run, accept=accept)
    assert text in str(error.value) and "1 field" in str(error.value)
    allowed = ["^steps$", f"^{key}$"]
    assert settings_diff.compare(read_meta(run)["config"], current, allowed) == []


def test_allowed_keys_may_change_and_tuples_equal_lists(run):
    current = {**CONFIG, "steps": 200, "log": {"every": 10}}
    saved = read_meta(run)["config"]
    assert [d.key for d in settings_diff.compare(saved, current)] == ["log/every", "steps"]
    assert settings_diff.compare(saved, current, ["^steps$", "^log/"]) == []
    with pytest.raises(UserError, match="no regular expression"):
        settings_diff.compare(saved, current, ["("])


def test_only_restores_a_sub_tree_without_the_rest(run):
    state, _ = restored(run, only=("ema",))
    assert state_digest(state["ema"]) == state_digest(state_of(30)["ema"])
    others = [v for k, v in state.items() if k != "ema"]
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(others))
    with Checkpoints(run, read_only=True) as checkpoints:
        alone, _ = checkpoints.restore_newest({"ema": abstract(state_of(0)["ema"])}, only=("ema",))
    assert state_digest(alone) == state_digest({"ema": state_of(30)["ema"]})


def test_only_ignores_damage_elsewhere_but_not_in_its_own_part(run):
    """The digest guards what is read; ``only`` with a wrong shape is refused all the same."""
    wanted = {"ema": {"dense": {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}}}
    with pytest.raises(UserError, match="ema/dense/bias: float32"):
        Checkpoints(run, read_only=True).restore_newest(wanted, only=("ema",))


def test_meta_is_read_without_arrays(run):
    assert read_meta(run)["step"] == 30 and read_meta(run, 10)["step"] == 10
    damage_meta_garbage(run / "30")
    assert read_meta(run)["step"] == 20
    with pytest.raises(UserError, match="holds no checkpoint"):
        read_meta(run.parent / "nowhere")


# --- saving


WRITING = """
    import sys, time, jax, jax.numpy as jnp, numpy as np
    from jointseg_jax.training.checkpoints import Checkpoints
    drawn = np.random.default_rng(0).integers(0, 2**32, 50_000_000, np.uint32)  # 200 MB
    abstract = {"w": jax.ShapeDtypeStruct(drawn.shape, drawn.dtype)}
    with Checkpoints(sys.argv[1], keep=1) as checkpoints:
        found = checkpoints.restore_newest(abstract)
        step = 0 if found is None else found[1]["step"]
        same = found is None or np.array_equal(found[0]["w"], drawn ^ np.uint32(step))
        left = sorted(p.name for p in checkpoints.folder.iterdir())
        print(step, same, *left, flush=True)
        del found
        while True:
            step += 1
            checkpoints.save(step, {"w": jnp.asarray(drawn ^ np.uint32(step))}, {})
            checkpoints.check()
"""


@pytest.mark.slow
def test_kills_while_a_checkpoint_is_written(tmp_path):
    """F2: 20 of 20 restore the newest whole step, to the bit, and leave nothing half-written."""
    folder, script, interrupted = tmp_path / "c", textwrap.dedent(WRITING), 0
    newest, delays = 0, np.random.default_rng(0)
    for _ in range(20 + 1):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "XLA_FLAGS": ""},
        )
        try:
            step, same, *left = child.stdout.readline().split()
            assert int(step) == newest and same == "True"
            assert left == ([str(newest)] if newest else [])
            while not [p for p in half_written(folder) if int(p.name) > newest]:
                assert child.poll() is None
                time.sleep(0.002)
            time.sleep(delays.uniform(0, 0.5))
        finally:
            child.kill()
            child.communicate()
        interrupted += bool(half_written(folder))
        newest = max((int(p.parent.name) for p in folder.glob("*/commit_success.txt")), default=0)
    assert interrupted >= 10


def half_written(folder):
    """Step folders without the marker that is written last."""
    return [p for p in folder.glob("[0-9]*") if not (p / "commit_success.txt").exists()]


@pytest.mark.thorough
def test_donation_while_a_save_is_in_flight(tmp_path):
    @jax.jit
    def make(i):
        return {"w": jnp.arange(1 << 20, dtype=jnp.float32) + i, "key": jax.random.key(0)}

    update = jax.jit(lambda s: {**s, "w": s["w"] * 1.5 + 1}, donate_argnums=0)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in range(5):
            state = make(jnp.float32(step))
            checkpoints.save(step, state, {"digest": state_digest(state)})
            for _ in range(3):
                state = update(state)
            checkpoints.check()
    shapes = jax.eval_shape(make, jnp.float32(0))
    for step in reversed(range(5)):  # each is read by setting the newer ones aside
        with Checkpoints(tmp_path, keep=5) as checkpoints:
            state, meta = checkpoints.restore_newest(shapes)
        assert meta["step"] == step and meta["digest"] == state_digest(state)
        (tmp_path / str(step)).rename(tmp_path / f"seen-{step}")


def test_leaves_must_be_arrays_and_meta_json(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="opt/lr is a float"):
            checkpoints.save(1, {"opt": {"lr": 0.1}}, {})
        with pytest.raises(ValueError, match="may not hold"):
            checkpoints.save(1, {"x": jnp.zeros(2)}, {"step": 4})
        assert checkpoints.newest() is None
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, {"x": jnp.zeros(2)}, {"config": object()})
        assert checkpoints.steps() == []


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):  # F10
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_vanished_folder_is_named(tmp_path):  # F10
    folder = tmp_path / "gone"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, {})
        checkpoints.wait()
        shutil.rmtree(folder)
        with pytest.raises(
            SaveError, match=r"checkpoint 2 in .*gone was not written: the folder is"
        ):
            checkpoints.save(2, {"x": jnp.zeros(3)}, {})


FULL = """
    import resource, sys, time, jax, jax.numpy as jnp, numpy as np
    from jointseg_jax.training.checkpoints import Checkpoints, SaveError
    big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=400_000), jnp.float32)}
    small = {"w": jnp.zeros(8)}
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, small, {}); checkpoints.wait()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        checkpoints.save(2, big, {})
        for _ in range(200):  # what a loop does: `check` alone tells it, one step after it failed
            checkpoints.check(); time.sleep(0.05)
        print("no error")
    except SaveError as error:
        print(error)
    checkpoints.check()
    print(checkpoints.save(3, small, {})); checkpoints.close()
    print(checkpoints.steps())
"""


@pytest.mark.thorough
def test_a_write_the_disk_refuses_is_told_and_earlier_steps_stay(tmp_path):
    """F9: a limit on the file size stands for a full disk: the write fails half-way all the same.

    On a disk that is really full, and through the launcher: tests/cli/test_faults.py.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=100,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert "checkpoint 2 in" in lines[0] and "(1.6 MB needed)" in lines[0]
    assert "Earlier checkpoints (1) are untouched" in lines[0]
    assert lines[1:] == ["True", "[1, 3]"]  # and the run may go on
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device"), "no space left on the disk (200.0 MB needed, "),
        (ValueError("RESOURCE_EXHAUSTED: writing: No space left on device"), "lower `keep`"),
        (OSError(30, "Read-only file system"), "may not be written"),
        (OSError(5, "Input/output error"), "reports an error"),
        (ValueError("shapes do not match"), None),
    ],
)
def test_what_the_file_system_refuses_becomes_a_sentence(tmp_path, error, text):
    from etils import epath

    from jointseg_jax.training.checkpoints import _reason

    found = _reason(error, epath.Path(tmp_path), 200_000_000)
    assert found is None if text is None else text in found


def test_warnings_need_no_set_up(run):
    assert logging.getLogger("jointseg_jax.training.checkpoints").isEnabledFor(logging.WARNING)
