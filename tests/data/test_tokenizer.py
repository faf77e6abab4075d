"""The word tokenizer: stable ids, nothing lost silently."""

import pickle
import unicodedata

import numpy as np
import pytest

from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.data.tokenizer import PADDING, UNKNOWN, Words, longest, split, vocabulary_of

WORDS = Words(vocabulary=("ball", "grass", "on"), length=4)


def test_ids_follow_the_vocabulary():
    np.testing.assert_array_equal(WORDS.encode("ball on GRASS"), [2, 4, 3, PADDING])
    np.testing.assert_array_equal(WORDS.encode("a ball"), [UNKNOWN, 2, PADDING, PADDING])
    assert WORDS.encode("ball").dtype == np.int32
    assert WORDS.size == 5


def test_splits_at_everything_that_is_not_a_letter():
    assert split("Two balls,2 boxes_and a-ring!") == ["two", "balls", "boxes", "and", "a", "ring"]
    assert split("Été à Łódź") == ["été", "à", "łódź"]
    assert split("") == split(" 12 ") == []


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("आधुनिक हिन्दी किताब", ["आधुनिक", "हिन्दी", "किताब"]),
        ("ప్రధానమంత్రిని కలుసుకున్నారు", ["ప్రధానమంత్రిని", "కలుసుకున్నారు"]),
        ("தமிழ் நூல், புதிது", ["தமிழ்", "நூல்", "புதிது"]),
        ("সুন্দর বই", ["সুন্দর", "বই"]),
        ("ที่นี่ ดี", ["ที่นี่", "ดี"]),
        ("ភាសាខ្មែរ", ["ភាសាខ្មែរ"]),
        ("မြန်မာ", ["မြန်မာ"]),
        ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
        ("كِتَابٌ جَدِيدٌ", ["كِتَابٌ", "جَدِيدٌ"]),
        ("می\u200cخواهم، خانه", ["می\u200cخواهم", "خانه"]),
        ("İstanbul ışık", ["istanbul", "ışık"]),
        ("I\u0307stanbul i\u0307l", ["istanbul", "il"]),
        ("CAFE\u0301 caf\u00e9", ["caf\u00e9", "caf\u00e9"]),
        ("Auto\u00adbahn \u200fשלום", ["autobahn", "שלום"]),
        ("m² 1\ufe0f\u20e3 🐈\u200d⬛ \u0301 x", ["m²", "x"]),
        ("Ein roter Ball, 2 blaue Würfel!", ["ein", "roter", "ball", "blaue", "würfel"]),
    ],
)
def test_words_of_every_script_keep_their_marks(caption, words):
    composed = [unicodedata.normalize("NFC", word) for word in words]
    assert split(caption) == composed
    # A vocabulary of them, and the same caption decomposed: a prompt and a file need not agree.
    known = Words(vocabulary=tuple(dict.fromkeys(composed)), length=8)
    other = unicodedata.normalize("NFD", caption)
    assert known.unknown(other) == () and known.unknown(caption) == ()
    np.testing.assert_array_equal(known.encode(other), known.encode(caption))


def test_words_that_differ_by_a_mark_only_differ():
    assert split("काल") != split("कील") and split("ışık") != split("işik")


def test_vocabularies_of_decomposed_letters_still_load():
    word = unicodedata.normalize("NFD", "한국")  # letters without any mark: once a word as it stood
    assert Words(vocabulary=(word,), length=1).encode("한국").tolist() == [UNKNOWN + 1]


def test_empty_prompt_is_padding():
    np.testing.assert_array_equal(WORDS.empty(), np.zeros(4, np.int32))
    np.testing.assert_array_equal(WORDS.encode(""), WORDS.empty())


def test_reports_what_it_cannot_keep():
    assert WORDS.unknown("a red ball on a red box") == ("a", "red", "box")
    assert WORDS.truncated("ball on grass on ball grass") == ("ball", "grass")
    assert WORDS.truncated("ball") == WORDS.unknown("ball") == ()
    np.testing.assert_array_equal(WORDS.encode("ball on grass on ball"), [2, 4, 3, 4])


def test_decode_inverts_encode_of_known_captions():
    assert WORDS.decode(WORDS.encode("ball on grass")) == "ball on grass"
    assert WORDS.decode(WORDS.encode("a ball")) == "? ball"
    with pytest.raises(ValueError, match=r"id 5 given; ids are 0\.\.4"):
        WORDS.decode(np.array([5, 0, 0, 0], np.int32))


def test_survives_pickle_and_hashes_by_value():
    copy = pickle.loads(pickle.dumps(WORDS))
    assert copy == WORDS and hash(copy) == hash(WORDS)
    np.testing.assert_array_equal(copy.encode("grass on"), WORDS.encode("grass on"))


def test_scenes_have_no_unknown_word():
    source = Scenes(size=16)
    captions = [source[i]["captions"][0] for i in range(300)]
    words = Words(vocabulary=vocabulary_of(source, Scenes(split="val")), length=longest(captions))
    assert words.vocabulary == source.words()
    for caption in captions:
        assert words.unknown(caption) == words.truncated(caption) == ()
        assert words.decode(words.encode(caption)) == " ".join(split(caption))


@pytest.mark.parametrize(
    ("vocabulary", "length", "text"),
    [
        (("ball",), 0, "length is 0"),
        (("ball", "Box"), 4, "Box"),
        (("two words",), 4, "two words"),
        (("ball", "box", "ball"), 4, "ball.* twice"),
    ],
)
def test_wrong_vocabularies_are_refused(vocabulary, length, text):
    with pytest.raises(ValueError, match=text):
        Words(vocabulary=vocabulary, length=length)
