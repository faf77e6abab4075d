import json

import numpy as np
import pytest

from jointseg_jax.data import captions
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample


def lines(tmp_path, *rows):
    path = tmp_path / "train.jsonl"
    encoded = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(encoded))
    return captions.read_lines(path)


def test_lines_and_several_captions_of_one_id(tmp_path):
    rows = [
        {"id": "a", "caption": "one"},
        {"id": "b", "caption": "x"},
        {"id": "a", "caption": "two"},
    ]
    assert lines(tmp_path, *rows, b"") == ({"a": ("one", "two"), "b": ("x",)}, [])


@pytest.mark.parametrize(
    "text, kept",
    [  # D13
        ("  a \n b\t", "a b"),
        ("nul\0l and bell\x07", "nul l and bell"),
        ("🐈‍⬛ on a mat", "🐈‍⬛ on a mat"),
        ("שלום לעולם", "שלום לעולם"),
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_cleaning(text, kept):
    assert captions.clean(text, "x") == kept


@pytest.mark.parametrize(
    "row, text",
    [  # D13
        (b'{"id": "b", "caption": "caf\xe9"}', "byte 0xe9 is not UTF-8"),
        (b"{", "not JSON (Expecting"),
        ({"id": "b"}, "no 'id' or no 'caption' in it"),
        ([1], "no 'id' or no 'caption' in it"),
        ({"id": "b", "caption": " \0 "}, "an empty caption"),
        ({"id": "b", "caption": 5}, "a caption of type int"),
        ({"id": "b", "caption": "x" * 100_000}, "a caption of 100000 characters, starting 'xxxx"),
    ],
)
def test_bad_lines_are_told_with_their_number(tmp_path, row, text):
    good = {"id": "a", "caption": "one"}
    found, problems = lines(tmp_path, good, b"", row, good)
    assert found["a"] == ("one", "one") and set(found) == {"a"}
    (problem,) = problems
    assert problem.path == f"{tmp_path}/train.jsonl:3" and text in str(problem)


def test_mapping_and_coco_files(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"a.jpg": "one", "b": ["x", " "]}))
    found, problems = captions.read_mapping(path)
    assert found == {"a.jpg": ("one",), "b": ("x",)} and len(problems) == 1
    rows = [{"image_id": 7, "caption": "p"}, {"image_id": 7, "caption": "q"}]
    path.write_text(json.dumps({"annotations": rows}))
    assert captions.read_coco(path) == ({"7": ("p", "q")}, [])
    with pytest.raises(BadSample, match=r"a list; \{id: caption\}"):
        path.write_text("[]")
        captions.read_mapping(path)
    with pytest.raises(BadSample, match="a COCO caption file"):
        path.write_text("{}")
        captions.read_coco(path)


def test_captions_from_labels():
    classes = Classes(names=("sky", "road", "tall tree"))
    labels = np.array([[2, 2, 2], [0, 0, -1]], np.int16)
    assert captions.describe(labels, classes) == "a picture of tall tree, sky"
    assert captions.describe(np.full((2, 2), -1, np.int16), classes) == "a picture of nothing"
    ties = np.array([[1, 0]], np.int16)
    assert captions.describe(ties, classes) == "a picture of sky, road"
    words = captions.described_words(classes)
    assert words == {"a", "picture", "of", "nothing", "sky", "road", "tall", "tree"}
