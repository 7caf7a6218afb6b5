# SPDX-License-Identifier: Apache-2.0
"""Strict matching and bad input: each error says what was asked, what was found, what to do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import assert_same, token, weight
from twins import draw as normal

import jaxcompress as jc
from jaxcompress import Recipe, Rule

PARAMS = {
    "block": {"up": {"kernel": normal(1, 4, 8), "bias": normal(2, 8)}, "norm": jnp.ones(8)},
    "down": {"kernel": normal(3, 8, 4)},
    "table": jnp.arange(6),
    "unused": normal(4, 3),
}
X = normal(5, 6, 4)


def model(p, x):
    up = p["block"]["up"]
    h = x[:, p["table"][:4] % 4] @ up["kernel"] + up["bias"][None]
    h = h * p["block"]["norm"][None] * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True))
    return jnp.tanh(h) @ p["down"]["kernel"]


def quantize(*rules, fn=model, params=PARAMS):
    return jc.quantize_aware(fn, Recipe(rules))(params, X)


def raises(error, *parts):
    """An error of this very type whose message has all these parts."""

    class Check:
        def __enter__(self):
            self.inner = pytest.raises(error)
            self.found = self.inner.__enter__()

        def __exit__(self, *args):
            handled = self.inner.__exit__(*args)
            text = str(self.found.value)
            for part in parts:
                assert part in text, f"{part!r} is not in {text!r}"
            assert self.found.type is error
            return handled

    return Check()


# ---------------------------------------------------------------------- names


def test_unknown_recipe():
    with raises(jc.RecipeError, "unknown recipe 'w8a88'", "Nearest: `w8a8`", "w4a16-g32"):
        jc.quantize_aware(model, "w8a88")
    with raises(jc.RecipeError, "unknown recipe ''", "All: w8a8"):
        jc.report(model, "")
    with raises(jc.RecipeError, "expected the name of a recipe or a Recipe, found 8"):
        jc.quantize_aware(model, 8)


def test_unknown_format():
    with raises(jc.FormatError, "There is no format 'int44'", "Did you mean int4"):
        Rule("*", weight="int44")
    with raises(jc.RecipeError, "There is no granularity 'chanel'", "'channel'"):
        jc.Quantizer("int8", "chanel")


def test_a_rule_that_matches_nothing():
    with raises(
        jc.RecipeError,
        "rule 'blok/up/*' matches nothing",
        "Nearest sites: `block/up/kernel`",
        "jaxcompress.sites(fn)(*args)",
    ):
        quantize(Rule("blok/up/*", weight="int8"))
    with raises(jc.RecipeError, "'re:blok/.*' matches nothing"):
        quantize(Rule("re:blok/.*", weight="int8"), Rule("*", weight="int8"))
    quantize(Rule("blok/up/*", weight="int8", optional=True), Rule("*", weight="int8"))


def test_a_model_without_sites():
    for recipe in ("w8a8", Recipe([Rule("*", weight="int8", optional=True)])):
        with raises(jc.RecipeError, "found nothing to compress", "Parameters: `a`", "argnums"):
            jc.quantize_aware(lambda p, x: x * p["a"], recipe)({"a": jnp.float32(2)}, X)
    with raises(jc.RecipeError, "found nothing to compress", "Does argnums name the argument"):
        jc.quantize_aware(lambda x, p: x @ p["w"] + 0 * p["w"].sum(), "w8a8", argnums=1)(
            X, {"w": jnp.arange(16).reshape(4, 4)}
        )


@pytest.mark.parametrize("name", ["block/norm", "block/up/bias", "unused", "table"])
def test_a_rule_on_what_no_site_reads(name):
    with raises(
        jc.RecipeError,
        f"rule {name!r} matches nothing that can be compressed",
        f"it names the parameter `{name}`, which no matmul",
        "norms, biases and integers stay as they are",
        "Remove the rule",
    ):
        quantize(Rule(name, weight="int8"), Rule("*", weight="int8"))
    quantize(Rule(name, None), Rule("*", weight="int8"))  # to leave it alone is no mistake


def test_a_rule_on_an_integer_matmul():
    f = lambda p, x: (jnp.arange(4) @ p["i"], x @ p["w"])  # noqa: E731
    params = {"i": jnp.arange(16).reshape(4, 4), "w": normal(1, 4, 4)}
    with raises(jc.RecipeError, "`i` (dot_general) is left alone", "not real floating-point"):
        quantize(Rule("i", weight="int8"), Rule("*", weight="int8"), fn=f, params=params)
    quantize(Rule("i", None), Rule("*", weight="int8"), fn=f, params=params)


def test_leave_alone_with_a_typo():
    with raises(jc.RecipeError, "rule 'block/norn' matches nothing", "Nearest"):
        quantize(Rule("block/norn", None), Rule("*", weight="int8"))
    with raises(jc.RecipeError, "rule 'dwon/*' matches nothing", "`down/kernel`"):
        jc.quantize_aware(model, jc.recipes.get("w8a8").skip("dwon/*"))(PARAMS, X)


def test_leave_everything_alone():
    q = jc.quantize_aware(model, jc.recipes.get("w8a8").skip("*"))
    assert_same(q(PARAMS, X), jax.jit(model)(PARAMS, X))


def test_a_rule_behind_a_wider_one():
    with raises(
        jc.RecipeError,
        "rule 'down/*'",
        "`down/kernel` is decided by the earlier rule '*'",
        "put the narrower one in front",
    ):
        quantize(Rule("*", weight="int8"), Rule("down/*", weight="int4"))
    quantize(Rule("down/*", weight="int4"), Rule("*", weight="int8"))


def test_op_and_source():
    def scores(p, x):
        q, k = x @ p["q"], x @ p["k"]
        return q @ k.T

    params = {"q": normal(1, 4, 4), "k": normal(2, 4, 4)}
    rules = [Rule("*", activation="int8", op="dot_general")]
    got = quantize(*rules, fn=scores, params=params)

    def twin(p, x):
        return token(token(x) @ p["q"]) @ token(token(x) @ p["k"]).T

    assert_same(got, jax.jit(twin)(params, X))
    with raises(jc.RecipeError, "rule '*', op='conv_general_dilated' matches nothing"):
        quantize(Rule("*", weight="int8", op="conv_general_dilated"), fn=scores, params=params)
    with raises(jc.RecipeError, "rule 'dot_general*'", "product of two activations"):
        quantize(
            Rule("dot_general*", activation="int8"), Rule("*", "int8"), fn=scores, params=params
        )
    here = Rule("*", weight="int8", source="test_errors.py:*")
    want = jax.jit(lambda p, x: (x @ weight(p["q"])) @ (x @ weight(p["k"])).T)(params, X)
    assert_same(quantize(here, fn=scores, params=params), want)
    with raises(jc.RecipeError, "source='model.py:*' matches nothing"):
        quantize(Rule("*", weight="int8", source="model.py:*"), fn=scores, params=params)
    line = jc.sites(scores)(params, X)[0].source.split("/")[-1].rsplit(":", 1)[0]
    assert line.startswith("test_errors.py:")
    first = quantize(Rule("*", "int8", source=line + ":*"), fn=scores, params=params)
    assert_same(first, want)  # both projections are in one line


# ---------------------------------------------------------------------- formats


def test_a_group_that_does_not_divide():
    calls = []

    def slow(p, x):
        jax.debug.callback(lambda: calls.append(1))
        return model(p, x)

    with raises(
        jc.SiteError,
        "int4 per group:3 does not fit `block/up/kernel` (weight [4, 8] of dot_general)",
        "length 4 is not a multiple of 3",
        "Sizes that fit: 2, 1",
        'Rule("block/up/kernel", None)',
    ):
        quantize(Rule("*", weight=jc.Quantizer("int4", "group:3")), fn=slow)
    assert not calls  # found before anything was computed
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (PARAMS, X))
    with pytest.raises(jc.SiteError, match="does not fit"):
        jc.report(model, Recipe([Rule("*", jc.Quantizer("int4", "group:3"))]))(*specs)
    for indivisible in ("pad", "channel"):
        quantize(Rule("*", jc.Quantizer("int4", "group:3"), indivisible=indivisible))


def tied(p, ids):
    return p["e"][ids] @ p["e"].T


def test_two_rules_on_one_array():
    params, ids = {"e": normal(6, 10, 4)}, jnp.array([[1, 2]])
    rules = [Rule("*", weight="int8", op="gather"), Rule("*", weight="int4")]
    with raises(
        jc.RecipeError,
        "two rules give `e` two formats: int8 per channel at `e` (gather) and int4 per channel "
        "at `e#1` (dot_general)",
        "shared=True",
    ):
        jc.quantize_aware(tied, Recipe(rules))(params, ids)
    with raises(jc.RecipeError, "two rules give `e` two formats", "float"):
        jc.quantize_aware(tied, Recipe([rules[0], Rule("*", None)]))(params, ids)
    shared = [Rule("*", weight="int8", op="gather", shared=True), rules[1]]
    jc.quantize_aware(tied, Recipe(shared))(params, ids)


def test_two_rules_on_one_array_in_two_derivatives():
    def step(p, ids, x):
        a = jax.grad(lambda p: jnp.sum(p["e"][ids] ** 2))(p)
        return a, jax.grad(lambda p: jnp.sum((x @ p["e"].T) ** 2))(p)

    rules = [Rule("*", weight="int8", op="gather"), Rule("*", weight="int4")]
    with raises(jc.RecipeError, "two rules give `e` two formats"):
        jc.quantize_aware(step, Recipe(rules))({"e": normal(6, 10, 4)}, jnp.array([1, 2]), X)


# ---------------------------------------------------------------------- arguments


def test_wrong_argnums():
    for argnums, said in ((2, "argnums=2"), (-3, "argnums=-3"), ("weights", "argnums='weights'")):
        with raises(
            jc.JaxCompressError,
            f"{said} names no argument: model was called with 2 positional arguments",
            "argnums says which arguments hold the parameters",
        ):
            jc.quantize_aware(model, "w8a8", argnums=argnums)(PARAMS, X)
    for argnums in (1.5, None, (), [0, None], True):
        with raises(jc.JaxCompressError, f"argnums={argnums!r}: expected the position or the name"):
            jc.quantize_aware(model, "w8a8", argnums=argnums)


def test_not_a_function():
    for thing in (PARAMS, 3, None):
        with raises(jc.JaxCompressError, f"expected a function, found {type(thing).__name__}"):
            jc.quantize_aware(thing, "w8a8")
        with raises(jc.JaxCompressError, "expected a function"):
            jc.sites(thing)


def test_errors_of_the_function_pass_through():
    def broken(p, x):
        raise KeyError("kernel_of_the_user")

    with pytest.raises(KeyError, match="kernel_of_the_user"):
        jc.quantize_aware(broken, "w8a8")(PARAMS, X)
    with pytest.raises(TypeError, match="dot_general"):
        jc.quantize_aware(lambda p, x: x @ p["w"], "w8a8")({"w": normal(1, 5, 4)}, X)
    # and a failed trace leaves nothing behind
    loss = lambda p, x: jnp.sum(model(p, x) ** 2)  # noqa: E731
    floats = {k: v for k, v in PARAMS.items() if k != "table"}

    def step(p, x):
        g = jax.grad(lambda p: loss({**p, "table": PARAMS["table"]}, x))(p)
        raise RuntimeError(str(len(g)))

    with pytest.raises(RuntimeError, match="3"):
        jc.quantize_aware(step, "w8a8")(floats, X)
    plain = jax.jit(jax.grad(loss, allow_int=True))(PARAMS, X)["down"]["kernel"]
    again = jax.grad(loss, allow_int=True)(PARAMS, X)["down"]["kernel"]
    assert_same(again, plain, 1e-5)  # eager against compiled


# ---------------------------------------------------------------------- recipes as text


@pytest.mark.parametrize(
    "text, parts",
    [
        ("{", ["not valid JSON"]),
        ("[]", ["a recipe is an object", "found list"]),
        ('{"rule": []}', ["unknown key 'rule' in a recipe", "did you mean 'rules'?"]),
        ('{"name": "x"}', ["a recipe needs 'rules'", "['name']"]),
        ('{"rules": {}}', ["`rules` is a list, found dict"]),
        ('{"rules": ["*"]}', ["a rule is an object", "found str"]),
        ('{"rules": [{"patern": "*"}]}', ["unknown key 'patern'", "did you mean 'pattern'?"]),
        ('{"rules": [{"weight": "int8"}]}', ["a rule needs 'pattern'"]),
        ('{"rules": [{"pattern": 3}]}', ["pattern", "3", "text"]),
        (
            '{"rules": [{"pattern": "*", "weight": {"format": "int8", "granularty": "tensor"}}]}',
            ["granularty", "granularity"],
        ),
        (
            '{"rules": [{"pattern": "*", "weight": {"granularity": "tensor"}}]}',
            ["format"],
        ),
        (
            '{"rules": [{"pattern": "*", "indivisible": "skip"}]}',
            ["indivisible='skip'", "expected one of ('error', 'pad', 'channel')"],
        ),
        ('{"rules": [{"pattern": "re:(", "weight": "int8"}]}', ["no regular expression"]),
        ('{"rules": [], "name": 3}', ["name", "3"]),
        ('{"rules": [{"pattern": "*", "optional": "no"}]}', ["optional", "'no'"]),
    ],
)
def test_recipe_text(text, parts):
    with raises(jc.RecipeError, *parts):
        Recipe.from_json(text)


def test_recipe_text_with_an_unknown_format():
    data = {"rules": [{"pattern": "*", "weight": {"format": "int88"}}]}
    with raises(jc.FormatError, "There is no format 'int88'", "int8"):
        Recipe.from_json(json.dumps(data))


def test_bad_rules():
    with raises(jc.RecipeError, "'re:*a' is no regular expression", "nothing to repeat"):
        Rule("re:*a", None)
    with raises(jc.RecipeError, "a recipe is a list of Rule, found str"):
        Recipe(["*"])
    for rules in (Rule("*", None), None):
        with raises(jc.RecipeError, f"a recipe is a list of Rule, found {type(rules).__name__}"):
            Recipe(rules)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("recipe", ["w8a8", "w8a16", "w4a16-g32", "fp8"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nan_weights_are_never_hidden(recipe, bad):
    f = lambda p, x: x @ p["w"]  # noqa: E731
    w = normal(7, 4, 8)
    params = {"w": w.at[1, 2].set(bad)}
    y, g = jax.value_and_grad(lambda p: jnp.sum(jc.quantize_aware(f, recipe)(p, X)))(params)
    assert not np.isfinite(y)
    rows = np.asarray(jc.quantize_aware(f, recipe)(params, X))
    assert not np.isfinite(rows[:, 2]).any()
    assert np.isfinite(rows[:, [0, 1, 3, 4, 5, 6, 7]]).all()  # other channels are not touched
    for r in (recipe, None):
        with raises(jc.FormatError, "parameter `w` has 1 NaNs or infinities among its 32 values"):
            jc.report(f, r)(params, X)


def test_nan_activations_are_never_hidden():
    f = lambda p, x: x @ p["w"]  # noqa: E731
    y = jc.quantize_aware(f, "w8a8")({"w": normal(7, 4, 8)}, X.at[2, 1].set(jnp.nan))
    assert np.isnan(np.asarray(y)[2]).all() and np.isfinite(np.delete(np.asarray(y), 2, 0)).all()


def test_nan_in_a_leaf_that_no_site_reads_is_an_error_in_the_report():
    bad = {**PARAMS, "unused": jnp.array([1.0, jnp.nan, jnp.nan])}
    with raises(jc.FormatError, "parameter `unused` has 2 NaNs or infinities among its 3 values"):
        jc.report(model, "w8a8")(bad, X)
    jc.quantize_aware(model, "w8a8")(bad, X)
