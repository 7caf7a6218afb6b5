# SPDX-License-Identifier: Apache-2.0
"""Recipes: JSON round trips, the first match wins, skip, shared, indivisible, patterns."""

import json

import jax
import jax.numpy as jnp
import pytest
from twins import assert_same, fake, token, weight
from twins import draw as normal

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule
from jaxcompress._core.patterns import matches

PARAMS = {"a": {"kernel": normal(1, 4, 8)}, "b": {"kernel": normal(2, 8, 4)}}
X = normal(3, 6, 4)


def mlp(p, x, wa=lambda w: w, wb=lambda w: w, ta=lambda x: x, tb=lambda x: x):
    return tb(jnp.tanh(ta(x) @ wa(p["a"]["kernel"]))) @ wb(p["b"]["kernel"])


def check(rules, **twins):
    got = jc.quantize_aware(lambda p, x: mlp(p, x), Recipe(rules))(PARAMS, X)
    assert_same(got, jax.jit(lambda p, x: mlp(p, x, **twins))(PARAMS, X))


def int4(w):
    return fake(w, 0, top=7.0)


# ---------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", jc.recipes.RECIPES)
def test_named_recipes_round_trip(name):
    recipe = jc.recipes.get(name)
    assert recipe.name == name
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and hash(again) == hash(recipe)
    assert Recipe.from_json(recipe.to_json(indent=None)) == recipe
    assert Recipe.from_json(again.skip("x", "re:y.*").to_json()) == recipe.skip("x", "re:y.*")
    assert jc.recipes.get(recipe) is recipe


def test_every_setting_round_trips():
    q = Quantizer("uint4", jc.per_group(8), range="minmax", indivisible="pad")
    rule = Rule(
        "re:a.*", q, "int8", op="dot_general", source="m.py:*", frozen=True,
        indivisible="channel", shared=True, optional=True,
    )  # fmt: skip
    recipe = Recipe([rule, Rule("*", None)], "mine")
    assert Recipe.from_json(recipe.to_json()) == recipe
    data = json.loads(recipe.to_json())
    assert data["name"] == "mine" and data["rules"][1] == {"pattern": "*"}


def test_names_in_json_as_in_python():
    text = '{"rules": [{"pattern": "*", "weight": "int4", "activation": "int8"}]}'
    assert Recipe.from_json(text) == Recipe([Rule("*", weight="int4", activation="int8")])
    text = '{"rules": [{"pattern": "*", "weight": {"format": "int4", "granularity": "group:2"}}]}'
    assert Recipe.from_json(text).rules[0].weight == Quantizer("int4", "group:2")


def test_a_recipe_is_a_value():
    recipes = {Recipe([Rule("*", weight="int8")]), Recipe([Rule("*", weight="int8")])}
    assert len(recipes) == 1
    with pytest.raises(AttributeError):
        Rule("*", None).pattern = "x"


# ---------------------------------------------------------------------- rules


def test_the_first_match_wins():
    check([Rule("a/*", weight="int4"), Rule("*", weight="int8")], wa=int4, wb=weight)
    check([Rule("a/*", None), Rule("*", weight="int8")], wb=weight)
    check([Rule("*", "int4", op="dot_general"), Rule("*", "int8", optional=True)], wa=int4, wb=int4)


def test_skip():
    recipe = jc.recipes.get("w8a8").skip("a/kernel")
    check(recipe.rules, wb=weight, tb=token)
    assert recipe.name == "w8a8"
    assert jc.recipes.get("w8a8").rules == recipe.rules[1:]  # the table is as it was
    check(recipe.skip("b/*").rules)


def test_weight_and_activation_alone():
    check([Rule("*", activation="int8")], ta=token, tb=token)
    check([Rule("b/*", weight="int8")], wb=weight)


def test_shared_holds_for_other_uses():
    params, ids = {"e": normal(4, 10, 4)}, jnp.array([1, 2])
    f = lambda p, ids: p["e"][ids] @ p["e"].T  # noqa: E731
    rules = [Rule("*", "int8", op="gather", shared=True), Rule("*", "int4", "int8")]
    rows = lambda e: weight(e, -1)  # noqa: E731
    want = jax.jit(lambda p, ids: token(rows(p["e"])[ids]) @ rows(p["e"]).T)(params, ids)
    assert_same(jc.quantize_aware(f, Recipe(rules))(params, ids), want)


def test_indivisible():
    grouped = Quantizer("int4", jc.per_group(3))
    channel = Rule("*", weight=grouped, indivisible="channel")
    check([channel], wa=int4, wb=int4)

    def padded(w):  # groups of 3 along the summed axis; the last one is shorter
        return jnp.concatenate([int4(w[i : i + 3]) for i in range(0, len(w), 3)])

    check([Rule("*", weight=grouped, indivisible="pad")], wa=padded, wb=padded)
    with pytest.raises(jc.SiteError, match="group:3 does not fit"):
        check([Rule("*", weight=grouped)])
    assert Rule("*", grouped, indivisible="pad").weight.indivisible == "pad"
    assert Rule("*", Quantizer("int4", "group:3", indivisible="pad")).weight.indivisible == "pad"


def test_frozen():
    teacher = normal(5, 4, 4)
    f = lambda p, x: (x @ teacher) @ p["a"]["kernel"]  # noqa: E731
    got = jc.quantize_aware(f, "w8a16")(PARAMS, X)
    assert_same(got, jax.jit(lambda p, x: x @ teacher @ weight(p["a"]["kernel"]))(PARAMS, X))
    rules = [Rule("*", weight="int8", frozen=True)]
    want = jax.jit(lambda p, x: x @ weight(teacher) @ weight(p["a"]["kernel"]))(PARAMS, X)
    assert_same(jc.quantize_aware(f, Recipe(rules))(PARAMS, X), want)


# ---------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    "pattern, name, same",
    [
        ("*", "a/b/c", True),
        ("a/*", "a/b/c", True),
        ("a/*", "b/a/c", False),
        ("*/kernel", "params/Dense_0/kernel", True),
        ("Dense_0/kernel", "params/Dense_0/kernel", True),
        ("params/Dense_0/kernel", "params/Dense_0/kernel", True),
        ("up/kernel", "up/kernel/value", True),
        ("up/kernel", "up/kernel#12", True),
        ("up/kernel#1", "up/kernel#1", True),
        ("up/kernel#1", "up/kernel#2", False),
        ("up/kernel#1", "up/kernel", False),
        ("re:layers_[02]/.*", "layers_2/w", True),
        ("re:layers_[02]/.*", "layers_1/w", False),
        ("re:layers", "layers_1", False),
        ("w", "a+w", True),
        ("a+w", "a+w#3", True),
        ("a", "b+w", False),
        ("layer_?", "layer_1", True),
        ("layer_?", "layer_12", False),
        ("LAYER", "layer", False),
        ("", "w", False),
    ],
)
def test_patterns(pattern, name, same):
    assert matches(pattern, name) is same
