"""Text files with a byte order mark are read as if it were not there; UTF-16 is named as such."""

import codecs
import hashlib

import pytest

from jointseg_jax.data import captions, files
from jointseg_jax.data.labels import read_classes
from jointseg_jax.data.records import BadSample
from jointseg_jax.data.sources.layouts import ids_of
from jointseg_jax.types import UserError

MARK = codecs.BOM_UTF8


def test_json_and_lists_with_a_mark(tmp_path):
    path = tmp_path / "classes.json"
    path.write_bytes(MARK + '{"classes": ["sky", "café"]}'.encode())
    assert read_classes(path)[0].names == ("sky", "café")
    (tmp_path / "train.txt").write_bytes(MARK + b"x\r\n\r\n" + MARK + b"y\r\n")
    assert ids_of(tmp_path / "train.txt") == ["x", "y"]
    (tmp_path / "picture.png").write_bytes(b"1")
    digest = hashlib.sha256(b"1").hexdigest().encode()
    (tmp_path / "SHA256SUMS").write_bytes(MARK + digest + b"  picture.png\r\n")
    assert files.Files.of(tmp_path).read("picture.png")[1] == b"1"


def test_captions_with_a_mark(tmp_path):
    path, line = tmp_path / "train.jsonl", b'{"id": "x", "caption": "a cat"}\r\n'
    path.write_bytes(MARK + line + MARK + line)
    assert captions.read_lines(path) == ({"x": ("a cat", "a cat")}, [])
    path.write_bytes(MARK + b'{"x": "a cat"}')
    assert captions.read_mapping(path) == ({"x": ("a cat",)}, [])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_bytes('{"classes": ["sky"]}'.encode(encoding))
    for read in (files.read_text, files.read_json, captions.read_lines, captions.read_mapping):
        with pytest.raises(BadSample, match=r"x\.json: is UTF-16 text; text files are UTF-8"):
            read(path)
    with pytest.raises(UserError, match="is UTF-16 text"):
        read_classes(path)
