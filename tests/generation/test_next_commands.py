"""The commands that a finished run suggests: those its system can do, with flags that exist."""

import ast
import runpy
import shlex
from pathlib import Path

import pytest

from jointseg_jax import build
from jointseg_jax.config import RunConfig
from jointseg_jax.data.given import given_images, given_labels
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.generation.examples import COUNT, write_examples
from jointseg_jax.generation.next_commands import next_commands, starts

ROOT = Path(__file__).parents[2]
OWN = "configs/pdm.py:data=folders"

SAMPLED = {
    "quickstart": ["--prompts"],
    "pdm": ["--prompts"],
    "pdm_given_maps": ["--given", "--prompts"],
    "semflow": ["--given"],
}
"""What each system is sampled from."""


def config_of(name, argument="smoke"):
    get_config = runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]
    return RunConfig.parse(get_config(argument).to_dict())


def suggested(config, workdir, examples=Path("examples")):
    info = DatasetInfo.of(build.source(config, "train"))
    system = build.system(config.system, info)
    return next_commands(config, system, workdir, examples, OWN)


def flags_of(launcher):
    """Names of the flags that a launcher defines; those of configs are overrides."""
    calls = [n for n in ast.walk(ast.parse((ROOT / launcher).read_text())) if hasattr(n, "func")]
    named = [c for c in calls if "DEFINE" in ast.unparse(c.func).upper() and c.args]
    return {c.args[0].value for c in named if isinstance(c.args[0], ast.Constant)}


def check(command):
    """Fails unless a printed command names a launcher, its flags, and values of its config."""
    comment, line = str(command).splitlines()
    python, launcher, *words = shlex.split(line)
    assert comment.startswith("# ") and python == "python"
    names = [w[2:].partition("=")[0] for w in words if w.startswith("--")]
    plain = [n for n in names if not n.startswith("config.")]
    assert set(plain) <= flags_of(launcher), line
    if "config" in plain:
        path, _, argument = words[words.index("--config") + 1].partition(":")
        values = runpy.run_path(str(ROOT / path))["get_config"](argument)
        for name in set(names) - set(plain):
            for part in name.split(".")[1:]:
                values = values[part]  # raises where there is no such field
            values = runpy.run_path(str(ROOT / path))["get_config"](argument)
    return names


@pytest.mark.parametrize("name", SAMPLED)
def test_a_system_of_pairs_is_sampled_measured_and_trained_on_own_data(name):
    commands = suggested(config_of(name), Path("runs/x"))
    assert [c.words[0] for c in commands] == [
        "launch/sample.py", "launch/evaluate.py", "launch/train.py",
    ]  # fmt: skip
    names = [check(command) for command in commands]
    assert [f"--{n}" for n in names[0] if n in ("prompts", "given")] == SAMPLED[name]


@pytest.mark.parametrize("name", ["jodiffusion_codec", "image_codec"])
def test_a_codec_is_measured_and_makes_no_pairs(name):
    measured, own = suggested(config_of(name), Path("runs/x"))
    assert measured.words == ("launch/evaluate.py", "--workdir", "runs/x")
    check(own)


def test_a_network_of_images_alone_is_neither_sampled_nor_measured():
    (own,) = suggested(config_of("pdm_two_stream", "stage=image,smoke"), Path("runs/x"))
    check(own)


def test_a_bridge_starts_from_either_end_and_a_joint_system_from_nothing():
    def system(name):
        config = config_of(name)
        return build.system(config.system, DatasetInfo.of(build.source(config, "train")))

    assert starts(system("semflow")) == ["image", "labels"]
    assert starts(system("pdm_given_maps")) == ["labels"]
    assert None in starts(system("quickstart"))


def test_numbers_of_steps_are_those_the_solver_takes():
    config = config_of("quickstart", "")
    _, measured, _ = suggested(config, Path("runs/x"))
    assert measured.words[-1] == "6,12,25"


def test_examples_are_what_every_launcher_reads(tmp_path):
    config = config_of("quickstart")
    folder = write_examples(config, tmp_path)
    source = build.records(config, "val")
    data = Folders(root=str(folder), split="val")
    assert len(data) == COUNT and data.classes.names == source.classes.names
    for i in range(COUNT):
        assert data[i]["captions"] == source[i]["captions"]
        assert (data[i]["image"] == source[i]["image"]).all()
        assert (data[i]["labels"] == source[i]["labels"]).all()
    assert len(Folders(root=str(folder), split="train")) == COUNT
    maps = given_labels(folder / "annotations/val", source.classes)
    assert (maps.load(2, (32, 32)) == source[2]["labels"]).all()
    assert len(given_images(folder / "images/val")) == COUNT
    prompts = (folder / "prompts.txt").read_text().splitlines()
    assert prompts == [source[i]["captions"][0] for i in range(COUNT)]


def test_examples_that_a_person_changed_stay(tmp_path):
    config = config_of("quickstart")
    prompts = write_examples(config, tmp_path) / "prompts.txt"
    prompts.write_text("two balls on sand\n")
    write_examples(config, tmp_path)
    assert prompts.read_text() == "two balls on sand\n"
