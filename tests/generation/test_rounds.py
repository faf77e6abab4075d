"""A round of several processes is listed in index order, as if one process had made it."""

import json

import numpy as np
import pytest

from jointseg_jax import distributed
from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.generation.rounds import RoundWriter
from jointseg_jax.types import UserError

SCENES = Scenes(size=32, count=8)


def write(writer, indices):
    """Writes pairs, and returns how many the calls listed."""
    pairs = [SCENES[i] for i in indices]
    return [
        writer.write(i, r["captions"][0], r["image"], r["labels"], {})
        for i, r in zip(indices, pairs)
    ]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def second_of_two(monkeypatch, start):
    """Makes this process the second, to which the first says ``start``; returns what it says."""
    said = []
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "from_first", lambda action: str(start))
    monkeypatch.setattr(distributed, "gather", lambda text: said.append(text) or [])
    return said


def first_of_two(monkeypatch, other):
    """Makes this process the first, to which the second has said ``other``."""
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "from_first", lambda action: action())
    monkeypatch.setattr(distributed, "gather", lambda text: [text, other])


def test_a_lone_process_lists_each_pair_at_once(tmp_path):
    writer = RoundWriter(tmp_path, SCENES.classes, {"seed": 0})
    assert write(writer, [0, 1]) == [1, 1] and writer.end_round() == 0
    assert [line["index"] for line in writer.pairs.lines] == [0, 1]
    assert RoundWriter(tmp_path, SCENES.classes, {"seed": 0}).start == 2


def test_two_processes_leave_the_folder_of_one(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    write(RoundWriter(one, SCENES.classes, {}), range(4))
    RoundWriter(two, SCENES.classes, {})  # the first process, as it begins
    with monkeypatch.context() as patch:
        said = second_of_two(patch, "[0, 0, []]")
        writer = RoundWriter(two, SCENES.classes, {})
        assert write(writer, [2, 3]) == [0, 0] and writer.end_round() == 0
    with monkeypatch.context() as patch:
        first_of_two(patch, said[0])
        writer = RoundWriter(two, SCENES.classes, {})
        assert write(writer, [0, 1]) == [0, 0]
        assert (two / "manifest.jsonl").read_text() == ""  # not before the round is over
        assert writer.end_round() == 4
    assert contents(two) == contents(one)


def test_two_processes_fill_gaps(tmp_path, monkeypatch):
    """G4: the second process makes the pair that is not whole, the first lists it and the rest."""
    write(RoundWriter(tmp_path, SCENES.classes, {}), range(4))
    before = contents(tmp_path)
    (tmp_path / "annotations/00000002.png").unlink()
    first = RoundWriter(tmp_path, SCENES.classes, {})
    with monkeypatch.context() as patch:
        said = second_of_two(patch, "[2, 4, [2]]")
        writer = RoundWriter(tmp_path, SCENES.classes, {})
        assert writer.needed(np.arange(5)).tolist() == [False, False, True, False, True]
        assert write(writer, [2]) == [0] and writer.end_round() == 0
    with monkeypatch.context() as patch:
        first_of_two(patch, said[0])
        first._together = True
        assert first.end_round() == 1
    first.pairs.close()
    assert contents(tmp_path) == before


def test_a_round_that_leaves_a_gap_is_refused(tmp_path, monkeypatch):
    first_of_two(monkeypatch, json.dumps([{"index": 3}]))
    writer = RoundWriter(tmp_path, SCENES.classes, {})
    write(writer, [0, 1])
    with pytest.raises(ValueError, match="pair 3 out of order; 2 is next"):
        writer.end_round()


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch):
    second_of_two(monkeypatch, "[0, 0, []]")
    with pytest.raises(UserError, match="a file system that all of them share"):
        RoundWriter(tmp_path, SCENES.classes, {})
