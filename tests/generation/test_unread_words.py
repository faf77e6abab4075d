"""What a run cannot take of a prompt is said before pairs are made, and kept in the manifest."""

import json
import logging
import runpy
import types
from pathlib import Path

import numpy as np
import pytest

from jointseg_jax import build
from jointseg_jax.config import RunConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.generation import sample as sampling
from jointseg_jax.generation.sample import SampleOptions, sample
from jointseg_jax.generation.unread_words import LINES, Unread, counts, say, unread_words
from jointseg_jax.training.workdir import Run

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that reads eight words, without parameters."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]("smoke").to_dict()
    config["system"]["text"]["length"] = 8
    config = RunConfig.parse(config)
    info = DatasetInfo(Classes(names=("sky", "road")), ("a", "café", "car", "on"), ("a car",))
    system = build.system(config.system, info)
    return Run(tmp_path_factory.mktemp("run"), config, info, system, {}, {}, step=0, digest="0")


LONG = "a car on a car on a car on a road"
ODD = "a purple Rhinoceros on a purple car"


def test_unknown_and_cut_words_of_each_prompt(run):
    prompts = ["a car", "a CAFE\u0301", ODD, LONG, ODD, "12 !", ""]
    found = unread_words(run, prompts)
    assert found == {
        ODD: Unread(unknown=("purple", "rhinoceros")),
        LONG: Unread(unknown=("road",), cut=("on", "a", "road")),
        "12 !": Unread(wordless=True),
    }
    assert counts(found) == {"prompts_with_unknown_words": 2, "prompts_cut": 1}
    assert counts({}) == {}


def test_a_line_for_each_prompt_and_no_more_than_can_be_read(run, caplog):
    with caplog.at_level(logging.WARNING, "jointseg_jax"):
        say(unread_words(run, [ODD, LONG, "12", *(f"zebra {'a ' * n}" for n in range(LINES))]))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == LINES + 1 and "3 more prompts" in lines[-1]
    assert lines[0] == f"prompt {ODD!r}: words that the run has never seen: purple, rhinoceros"
    assert "too long, its last words are cut: on a road" in lines[1]
    assert "no word in it" in lines[2]


def test_sampling_says_it_first_and_keeps_it_in_the_manifest(run, tmp_path, caplog, monkeypatch):
    height, width = run.system.size

    def pairs(*arguments):
        assert "rhinoceros" in caplog.text  # before anything is made
        fields = {"image": np.zeros((3, height, width, 3), np.uint8)}
        fields["labels"] = np.zeros((3, height, width), np.int32)
        yield np.arange(3), fields | {"confidence": np.ones((3, height, width), np.float32)}

    made = types.SimpleNamespace(batch_size=3)
    monkeypatch.setattr(sampling, "make_sampler", lambda *_, **__: made)
    monkeypatch.setattr(sampling, "host_pairs", pairs)
    with caplog.at_level(logging.WARNING, "jointseg_jax"):
        report = sample(run, tmp_path, SampleOptions(num=3, prompts=("a car", ODD, LONG)))
    assert report["prompts_with_unknown_words"] == 2 and report["prompts_cut"] == 1
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert "unknown_words" not in lines[0] and "cut_words" not in lines[0]
    assert lines[1]["unknown_words"] == ["purple", "rhinoceros"] and "cut_words" not in lines[1]
    assert lines[2]["cut_words"] == ["on", "a", "road"]
