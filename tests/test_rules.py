"""Path rules: first match wins, nothing unmatched, nothing dead."""

import flax.struct
import jax
import pytest

from jointseg_jax import rules
from jointseg_jax.types import UserError

TREE = {"denoiser": {"mid": {"kernel": 1, "bias": 2}, "blocks": [3, 4]}, "text": {"table": 5}}
PATHS = [
    "denoiser/blocks/0",
    "denoiser/blocks/1",
    "denoiser/mid/bias",
    "denoiser/mid/kernel",
    "text/table",
]


@flax.struct.dataclass
class State:
    params: dict
    step: int


def test_paths_join_keys_indices_and_fields():
    assert rules.paths(TREE) == PATHS
    assert rules.paths(State(params={"a": 1}, step=2)) == ["params/a", "step"]


def test_leaves_by_path_nest_back_into_their_tree():
    tree = {"b": {"c": {"d": 1}, "a": 2}, "a": 3}
    flat = rules.by_path(tree)
    assert flat == {"a": 3, "b/a": 2, "b/c/d": 1}
    assert rules.nested(flat) == tree


def test_the_first_rule_that_matches_gives_the_value():
    found = rules.match(TREE, [(r"bias$", "no"), (r"^denoiser/", "yes"), (r"", "rest")], where="x")
    assert dict(zip(PATHS, jax.tree.leaves(found))) == {
        "denoiser/blocks/0": "yes",
        "denoiser/blocks/1": "yes",
        "denoiser/mid/bias": "no",
        "denoiser/mid/kernel": "yes",
        "text/table": "rest",
    }


def test_a_prefix_stands_before_every_path():
    found = rules.match(TREE, [(r"^params/text/", True), (r"", False)], where="x", prefix="params/")
    assert sum(jax.tree.leaves(found)) == 1


def test_a_leaf_without_a_rule_is_an_error_that_names_it():
    with pytest.raises(UserError) as error:
        rules.match(TREE, [(r"^denoiser/", True)], where="trainable")
    assert str(error.value).startswith("trainable rules: 1 leaves match no rule, first: text/table")


def test_many_leaves_without_a_rule_are_counted():
    tree = {f"leaf{i}": i for i in range(9)}
    with pytest.raises(UserError, match=r"9 leaves match no rule, first: leaf0, .*, leaf4\. Add"):
        rules.match(tree, [(r"^other", True)], where="trainable", dead="allow")


def test_a_rule_without_a_leaf_is_an_error_unless_allowed():
    dead = [(r"mid_blok", False), (r"", True)]
    with pytest.raises(UserError, match="decay rules: no leaf matches 'mid_blok'"):
        rules.match(TREE, dead, where="decay")
    assert all(jax.tree.leaves(rules.match(TREE, dead, where="decay", dead="allow")))


def test_a_rule_that_another_one_hides_is_dead():
    with pytest.raises(UserError, match="no leaf matches '\\^text/'"):
        rules.match(TREE, [(r"", True), (r"^text/", False)], where="trainable")


def test_a_regex_that_does_not_compile_is_named():
    with pytest.raises(UserError, match=r"decay rules: '\(' is not a regular expression"):
        rules.match(TREE, [(r"(", True)], where="decay")
