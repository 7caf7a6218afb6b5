# SPDX-License-Identifier: Apache-2.0
"""Statistics of the inputs of sites, against sums over all tokens at once in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress._calibration.collectors import COLLECTORS
from jaxcompress._calibration.rows import rows_of
from jaxcompress._calibration.stream import Batches, collect

SUMS = 1e-4  # float32 sums of some hundred products, relative to the largest


def rng(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolve(strides, padding, groups):
    def fn(w, x):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    return fn


CASES = {
    "matmul": (lambda w, x: x @ w, rng(6, 5), (4, 3, 6)),
    "transposed": (lambda w, x: jnp.einsum("ab,tsb->tsa", w, x), rng(5, 6), (4, 3, 6)),
    "two contracted": (lambda w, x: jnp.einsum("tij,ijo->to", x, w), rng(2, 3, 5), (7, 2, 3)),
    "swapped": (lambda w, x: jnp.einsum("tij,jio->to", x, w), rng(3, 2, 5), (7, 2, 3)),
    "experts": (lambda w, x: jnp.einsum("eti,eio->eto", x, w), rng(3, 4, 5), (3, 7, 4)),
    "conv": (convolve((1, 2), "SAME", 1), rng(3, 2, 4, 5), (2, 6, 6, 4)),
    "grouped conv": (convolve((1, 1), "VALID", 2), rng(3, 3, 2, 6), (2, 5, 5, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_multiply_like_the_site(case):
    """The output of the site is w x, for every output, from the rows of weight and input."""
    fn, w, shape = CASES[case]
    x = rng(*shape, seed=1)
    (site,) = jc.sites(fn)(w, x)
    rows = rows_of(site, site.weights[0])
    matrix = np.asarray(rows.of(jnp.asarray(w)), np.float64)
    np.testing.assert_array_equal(rows.back(rows.of(jnp.asarray(w))), w)
    found = collect(fn, w, Batches([x]), {site.name: ("gram", "mean", "count")})[site.name]
    y = np.asarray(fn(w, x), np.float64)  # sum of squares and sum of outputs, both ways
    gram = np.asarray(found["gram"], np.float64)
    energy = np.einsum("...oi,...ij,...oj->...", matrix, gram, matrix)
    np.testing.assert_allclose(np.sum(energy), np.sum(y**2), rtol=SUMS)
    count = np.asarray(found["count"], np.float64)[..., None]
    total = np.einsum("...oi,...i->...o", matrix, np.asarray(found["mean"], np.float64) * count)
    np.testing.assert_allclose(np.sum(total), np.sum(y), rtol=1e-3, atol=1e-2)


def test_ragged_rows_belong_to_their_expert():
    w, x, sizes = rng(3, 4, 5), rng(8, 4, seed=1), jnp.array([3, 0, 5])
    fn = lambda w, x, sizes: lax.ragged_dot(x, w, sizes)  # noqa: E731
    (site,) = jc.sites(fn)(w, x, sizes)
    found = collect(fn, w, Batches([jc.Inputs(x, sizes)]), {site.name: ("gram", "count")})
    for e, part in enumerate((x[:3], x[3:3], x[3:])):
        np.testing.assert_allclose(found[site.name]["gram"][e], part.T @ part, atol=1e-4)
    assert found[site.name]["count"].tolist() == [3, 0, 5]


def test_all_collectors_over_batches_equal_one_look_at_everything():
    parts = [rng(5, 4, seed=i) for i in range(3)]
    found = collect(lambda w, x: x @ w, jnp.eye(4), Batches(parts), {"arg0": tuple(COLLECTORS)})
    x = np.concatenate(parts).astype(np.float64)
    want = {
        "count": 15, "absmax": np.abs(x).max(0), "mean": x.mean(0),
        "magnitude": np.abs(x).mean(0), "norm": np.sqrt((x**2).sum(0)), "gram": x.T @ x,
    }  # fmt: skip
    low, high = found["arg0"].pop("minmax")
    np.testing.assert_allclose([low, high], [x.min(0), x.max(0)], rtol=1e-6)
    assert found["arg0"].keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found["arg0"][name], value, rtol=SUMS, atol=1e-6, err_msg=name)


def layers(params, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["w"])[0]


@pytest.mark.parametrize(("lead", "n"), [((), 256), ((), 301), ((2,), 1023)])
def test_gram_of_many_channels(lead, n):
    """Summed in parts of the channels, also of sizes that do not divide."""
    gram, rng = COLLECTORS["gram"], np.random.default_rng(0)
    state, want = gram.init(lead, n), 0.0
    for tokens in (5, 8):
        x = rng.normal(size=(*lead, tokens, n)).astype(np.float32)
        state = jax.jit(gram.update)(state, x, np.full(lead, tokens), ())
        want = want + np.einsum("...ti,...tj->...ij", x, x, dtype=np.float64)
    np.testing.assert_allclose(gram.finish(state), want, atol=1e-4)


def test_one_layer_of_a_scan_equals_that_of_all_and_runs_no_other():
    params, x = {"w": jnp.asarray(rng(4, 3, 3))}, rng(6, 3, seed=1)
    whole = collect(layers, params, Batches([x]), {"w": ("gram",)})["w"]["gram"]
    for k in range(4):
        spoilt = {"w": params["w"].at[k + 1 :].set(jnp.nan)}  # later layers are not looked at
        one = collect(layers, spoilt, Batches([x]), {"w": ("gram",)}, layer=k)
        np.testing.assert_allclose(one["w"]["gram"], whole[k], rtol=1e-5, atol=1e-6)


def test_eight_devices_see_what_one_sees():
    x = rng(16, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    names = ("gram", "absmax", "mean")
    one, many = (
        collect(lambda w, x: x @ w, jnp.eye(4), Batches([b]), {"arg0": names})["arg0"]
        for b in (x, split)
    )
    for name in names:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([np.ones((0, 4), np.float32)], "batch 0 has an empty array"),
        ([np.ones((2, 4), np.float32), np.full((2, 4), np.nan)], "batch 1 .* NaN .* `arg0`"),
        ([], "no batches"),
    ],
)
def test_bad_batches_are_named(batches, words):
    with pytest.raises(jc.JaxCompressError, match=words):
        collect(lambda w, x: x @ w, jnp.eye(4), Batches(batches), {"arg0": ("gram",)})


def test_an_iterator_is_walked_once_and_a_function_again():
    batches = Batches(iter([1, 2]))
    assert batches.first().args == (1,)
    assert [b.args for b in batches] == [(1,), (2,)]
    with pytest.raises(jc.JaxCompressError, match="several times"):
        list(batches)
    again = Batches(lambda: iter([1, 2]))
    assert [len(list(again)) for _ in range(2)] == [2, 2]
