"""JSON lines survive a kill: a torn line costs itself and no other."""

import json

import pytest

from jointseg_jax import jsonl

TORN = [b'{"a": ', b"\x00\x00", b"\xff\n", b"[1]\n", b"3\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("tail", TORN)
def test_what_follows_a_damaged_line_is_read_or_not_as_asked(tmp_path, tail):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    jsonl.append(path, {"a": 2})
    assert jsonl.read(path) == [{"a": 1}, {"a": 2}]
    assert list(jsonl.read_until_damaged(path)) == [{"a": 1}]
    assert jsonl.cut_torn_tail(path) == 0  # the last line is whole


@pytest.mark.parametrize("tail", [*TORN, b'{"a": 2}'])
def test_a_torn_tail_is_cut(tmp_path, tail):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert list(jsonl.read_until_damaged(path)) == [{"a": 1}]
    assert jsonl.cut_torn_tail(path) == len(tail)
    assert path.read_bytes() == b'{"a": 1}\n'


def test_no_file_has_no_torn_tail(tmp_path):
    assert jsonl.cut_torn_tail(tmp_path / "none.jsonl") == 0


def test_a_line_is_one_line_and_refuses_what_json_lacks():
    text = "a\nb\u2028ö"
    for ascii_only in (True, False):
        data = jsonl.line({"text": text}, ascii_only=ascii_only)
        assert data.count(b"\n") == 1 and data.endswith(b"\n") and json.loads(data)["text"] == text
    assert "ö".encode() in jsonl.line({"text": text}, ascii_only=False)
    assert jsonl.line({"x": float("nan")}) == b'{"x": NaN}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl.line({"x": float("nan")}, allow_nan=False)


def test_seconds_as_text():
    given = (0.04, 59.94, 60.0, 245.4, 3599.4, 3599.6, 43445.0)
    expected = ["0.0 s", "59.9 s", "1:00 min", "4:05 min", "59:59 min", "1:00:00 h", "12:04:05 h"]
    assert [jsonl.duration(seconds) for seconds in given] == expected
    assert jsonl.clock(753.0) == "0:12:33" and jsonl.clock(35999.4) == "9:59:59"
