"""The word tokenizer: stable ids, nothing lost silently."""

import pickle

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
