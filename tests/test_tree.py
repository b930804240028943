"""Paths, names and counts of trees, against what is written here by hand."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jlora import tree

TREE = {"layers": {"self_attn": {"q_proj": {"kernel": np.zeros((3, 4, 5), np.float16)}}, "mlp": [np.ones(2), None]}}
Q = "layers/self_attn/q_proj/kernel"
LEAVES = {Q: 1, "layers/self_attn/k_proj/kernel": 2, "layers/mlp/up_proj/kernel": 3, "lm_head/kernel": 4}


def test_paths_are_joined_keys_in_tree_order():
    assert list(tree.paths(TREE)) == ["layers/mlp/0", Q]
    found = tree.paths(TREE, lambda x: isinstance(x, list))
    assert list(found) == ["layers/mlp", Q] and found["layers/mlp"] is TREE["layers"]["mlp"]
    keyed, treedef = tree.flatten(TREE)
    assert jax.tree.unflatten(treedef, [leaf for _, leaf in keyed])["layers"]["mlp"][1] is None


def test_a_box_of_flax_adds_no_name_and_a_weight_called_value_keeps_its_own():
    class Dense(nnx.Module):
        def __init__(self):
            self.up, self.table = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param(jnp.ones(2))

    _, state = nnx.split(Dense())
    assert list(tree.paths(state)) == ["table", "up/bias", "up/kernel"]
    assert {"up/bias", "up/kernel"} < set(tree.paths(Dense()))
    assert list(tree.paths({"w": nn.Partitioned(jnp.ones(2), ("a",)), "value": jnp.ones(2)})) == ["value", "w"]

    class Attention(eqx.Module):
        inner: Any
        value: Any

    own = Attention(Attention(None, jnp.ones(2)), jnp.ones(2))
    assert list(tree.paths(own)) == ["inner/value", "value"]


@pytest.mark.parametrize(
    "pattern, meant",
    [
        ("q_proj", True),
        ("self_attn/q_proj", True),
        ("self_attn.q_proj", True),
        ("/q_proj/", True),
        (Q, True),
        ("proj", False),
        ("q_proj/layers", False),
        ("q_.roj", False),  # a dot alone makes no regex: it parts names
        ("[qk]_proj", True),
        ("proj/kernel$", True),
        ("^q_proj", False),
        ("self_attn|mlp", True),
    ],
)
def test_a_name_is_a_run_of_components_and_a_regex_is_searched(pattern, meant):
    assert tree.matches(pattern, Q) is meant


def test_a_dotted_path_is_one_of_slashes():
    assert tree.matches("self_attn/q_proj", "layers.self_attn.q_proj.weight")


def test_what_is_no_regex_is_told():
    with pytest.raises(ValueError, match=r"'\(q_proj' is no regex: missing \)"):
        tree.matches("(q_proj", Q)


def test_the_first_pattern_that_means_a_path_gives_the_value():
    assert tree.first_match({"k_proj": 1, "[qk]_proj": 2, "q_proj": 3}, Q, 4) == 2
    assert tree.first_match({"k_proj": 1}, Q, 4) == 4


def test_selected_paths_come_in_tree_order_once():
    assert tree.select(["mlp", "q_proj", Q], LEAVES) == [Q, "layers/mlp/up_proj/kernel"]
    assert tree.select("lm_head", LEAVES) == ["lm_head/kernel"]
    assert tree.select(lambda path, leaf: leaf > 2 and "mlp" in path, LEAVES) == ["layers/mlp/up_proj/kernel"]


def test_nothing_selected_is_told_with_the_nearest_names():
    with pytest.raises(ValueError, match=r"^exclude: 'q_porj' matches no leaf; near: q_proj, "):
        tree.select("q_porj", LEAVES, "exclude")
    with pytest.raises(ValueError, match=r"^targets: the predicate is true for none of the 4 leaves$"):
        tree.select(lambda path, leaf: False, LEAVES)


def test_near_lists_four_names_or_says_that_there_is_none():
    assert tree.near("zzzzzz", LEAVES) == f"; there are: {', '.join(LEAVES)}"
    assert tree.near("zzzzzz", [f"w{n}" for n in range(9)]) == "; there are: w0, w1, w2, w3"
    assert tree.near("zzzzzz", [f"v/{n}" for n in range(9)]) == "; there are: v/0, v/1, v/2, v/3"
    assert tree.near("proj_0", [f"proj_{n}" for n in range(9)]).count("proj_") == 4
    assert tree.near("any", []) == "; the tree has no leaves"
    assert tree.near("abcd", ["abxy"]) == "; near: abxy"  # half alike


@pytest.mark.parametrize(
    "path, number",
    [
        ("layers_3/mlp/kernel", 3),
        ("h/12/attn/c_attn/kernel", 12),
        ("encoder_1/layer/4/dense_0/kernel", 4),
        ("Block_3/Dense_0/kernel", 3),
        ("mlp/linear_2/w", 2),
        ("layers/self_attn/q_proj/kernel", None),
        ("layers/Dense_0/kernel", None),  # rows of a stack
        ("model.layers.3.mlp.weight", 3),
        ("layers.mlp.weight", None),
        ("conv2d/kernel", None),
    ],
)
def test_the_number_of_a_layer(path, number):
    assert tree.layer_of(path) == number


def test_sizes_count_elements_and_bytes_of_every_kind_of_leaf():
    key = jax.random.key(0)
    assert tree.size(TREE) == 62
    assert tree.size({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "b": 7.0}) == 6
    assert tree.nbytes(TREE) == 120 + 8  # float64 is float32 to JAX
    assert tree.nbytes({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16), "b": 7.0, "key": key}) == 12
