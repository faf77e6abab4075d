"""Pairs of one folder never share a name, whatever the items they are made from are called."""

import hashlib

import numpy as np
import pytest

from jointseg_jax.data.classes import Classes
from jointseg_jax.generation.pair_names import PairNames, same_file
from jointseg_jax.generation.rounds import RoundWriter
from jointseg_jax.types import UserError

NUMBERED = [
    ("cat", "dog"),
    ("cat", "cat-2", "dog"),
    ("cat", "cat-2", "cat-2-2", "cat-3"),
    ("cat", "cat-", "cat-3", "cat--2"),
    ("Cat", "cAT-2", "cat--3", "cat---10"),
    ("caf\u00e9", "cafe\u0301-2"),
    ("a/b", "a/b-2", "a", "a-2/b"),
    ("0", "0-0002", "0-1"),
    ("-2", "--2", "-2-2"),
]


@pytest.mark.parametrize("ids", NUMBERED, ids=" ".join)
def test_no_two_pairs_have_one_name(ids):
    names = [PairNames(ids)(index) for index in range(30 * len(ids))]
    assert tuple(names[: len(ids)]) == ids
    assert len({same_file(name) for name in names}) == len(names)


@pytest.mark.parametrize("ids", [("cat", "dog"), ("0", "0-0002", "0-1"), ("cat", "dog-2")])
def test_the_second_pair_of_an_item_has_a_2_where_that_is_free(ids):
    names = PairNames(ids)
    assert [names(len(ids) + i) for i in range(len(ids))] == [f"{name}-2" for name in ids]


@pytest.mark.parametrize("ids", [("a", "a"), ("a", "A"), ("caf\u00e9", "cafe\u0301")])
def test_items_of_one_name_are_refused(ids):
    with pytest.raises(UserError, match=r"are the same, or differ by case or Unicode form"):
        PairNames(ids)


def write(folder, names):
    """Makes what is missing of a folder's pairs; returns their indices and the manifest's lines."""
    writer, made = RoundWriter(folder, Classes(names=("a", "b")), {}), []
    for index, name in enumerate(names):
        if writer.needed(np.array([index]))[0]:
            image = np.full((4, 4, 3), 40 * index, np.uint8)
            writer.write(index, "", image, np.zeros((4, 4), np.int16), {}, name=name)
            made.append(index)
    writer.pairs.close()
    return made, writer.pairs.lines


def whole(folder, line):
    return hashlib.sha256((folder / line["image"]).read_bytes()).hexdigest() == line["image_sha256"]


def test_every_line_has_files_of_its_own_and_a_second_call_makes_nothing(tmp_path):
    names = [PairNames(("cat", "cat-2", "dog"))(index) for index in range(6)]
    made, lines = write(tmp_path, names)
    assert made == list(range(6)) and all(whole(tmp_path, line) for line in lines)
    assert write(tmp_path, names) == ([], lines)


def test_a_name_that_is_taken_is_refused_before_its_file_is_replaced(tmp_path):
    with pytest.raises(ValueError, match="pairs 0 and 1 are both named 'CAT'"):
        write(tmp_path, ["cat", "CAT"])
    _, lines = write(tmp_path, ["cat"])
    assert whole(tmp_path, lines[0])


def test_a_folder_in_which_names_collided_is_fixed(tmp_path):
    made, lines = write(tmp_path, ["cat", "cat-2", "cat-3"])
    # as an earlier release left it: two lines of one name, whose file is the later pair's
    text = (tmp_path / "manifest.jsonl").read_text().replace("cat-3", "cat-2")
    (tmp_path / "manifest.jsonl").write_text(text)
    for folder in ("images", "annotations"):
        (tmp_path / folder / "cat-3.png").rename(tmp_path / folder / "cat-2.png")
    made, lines = write(tmp_path, ["cat", "cat-2", "cat--2"])
    assert made == [1, 2] and all(whole(tmp_path, line) for line in lines)
