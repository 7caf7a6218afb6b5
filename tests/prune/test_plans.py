# SPDX-License-Identifier: Apache-2.0
"""Schedules, distributions and structures against closed forms and the tables of jaxpruner."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import prune
from jaxcompress.prune._allocate import pruned_count

A, B, C = (2, 4), (3, 6), (2, 4, 6)


def test_cubic_is_the_equation_of_the_paper():
    schedule = prune.cubic(0.1, 0.9, 100, 900)
    for step in (0, 99, 100, 101, 333, 500, 899, 900, 5000):
        want = 0 if step < 100 else 0.9 - 0.8 * (1 - min((step - 100) / 800, 1)) ** 3
        for found in (schedule(step), jax.jit(schedule)(step)):
            assert abs(float(found) - want) < 1e-6  # float32


def test_table_of_jaxpruner_schedules():
    assert float(prune.cubic(0, 0.5, 0, 20)(10)) == 0.4375  # their step 9 counts from 1
    one = prune.one_shot(0.5, 20)
    assert [float(jax.jit(one)(s)) for s in (19, 20, 21)] == [0, 0.5, 0.5]
    assert prune.constant(0.5)(10) == 0.5


@pytest.mark.parametrize(
    ("sparsity", "options", "want"),
    [
        (0.5, {}, [0, 0.31, 0.655]),
        (0.5, {"kernel": False}, [0.21, 0.47, 0.56]),
        # They ask for 0.8 and round down in every array: 6 + 14 + 38 of 74.
        (58 / 74, {}, [0.556, 0.70, 0.85]),
        (0.5, {"power": 2.0}, [0, 0.033, 0.758]),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_table_of_jaxpruner_erk(sparsity, options, want, traced):
    share = functools.partial(prune.erk, [A, B, C], **options)
    found = jax.jit(share)(jnp.float32(sparsity)) if traced else share(sparsity)
    np.testing.assert_allclose(found, want, atol=5.1e-3)  # they print two places


@pytest.mark.parametrize(
    ("shapes", "want"),
    [([A], [0.5]), ([A, (3, 6, 7), (7, 4)], [0, 0.64, 0]), ([A, (3, 6, 7)], [0, 0.53])],
)
def test_table_of_jaxpruner_erk_of_trees(shapes, want):
    np.testing.assert_allclose(prune.erk(shapes, 0.5), want, atol=5.1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("traced", [False, True])
def test_erk_has_the_sparsity_asked_for(sparsity, traced):
    shapes = [(784, 300), (300, 100), (100, 10), (3, 3, 16, 32), (5, 5)]
    found = np.array(prune.erk(shapes, jnp.float32(sparsity) if traced else sparsity))
    sizes = np.array([math.prod(s) for s in shapes])
    assert abs(found @ sizes / sizes.sum() - sparsity) < (1e-6 if traced else 1e-12)
    assert (found >= 0).all() and (found < 1).all()
    density = (1 - found) * sizes / np.array([sum(s) for s in shapes])
    sparse = found > 1e-6
    assert np.ptp(density[sparse]) < 1e-4 * density.max() if sparse.any() else sparsity == 0


def test_counts_of_numbers_and_of_float32_agree():
    for sparsity in (0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.99):
        for size in (1, 3, 7, 10, 25, 100, 4096, 99_999):
            want = round(sparsity * size)
            assert pruned_count(sparsity, size) == want
            assert int(pruned_count(jnp.float32(sparsity), size)) == want, (sparsity, size)


# jaxpruner, mask_calculator_test.py: blocks of the scores of a matrix, mean.
def test_table_of_jaxpruner_blocks():
    scores = np.float32(
        [
            [0.69, 0.37, 0.96, 0.81, 0.79, 0.55],
            [0.66, 0.88, 0.4, 0.83, 0.13, 0.8],
            [0.34, 0.17, 0.07, 0.74, 0.13, 0.13],
            [0.13, 0.92, 0.25, 0.75, 0.37, 0.42],
        ]
    )
    found = pruned_by(prune.magnitude(0.2, structure=prune.blocks(2, 3)), scores)
    want = np.ones((4, 6), bool)
    want[2:, :3] = False  # the block with the smallest mean
    np.testing.assert_array_equal(found, want)


def pruned_by(pruner, weights):
    """The mask of a weight after one step that changes nothing else."""
    tx = optax.chain(optax.sgd(0.0), pruner)
    params = {"w": jnp.asarray(weights)}
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.ones_like, params), tx.init(params), params
    )
    mask = np.asarray(prune.masks(state)["w"])
    new = np.asarray(optax.apply_updates(params, updates)["w"])
    np.testing.assert_array_equal(new, np.where(mask, weights, 0))
    return mask


RNG = np.random.default_rng(1)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_channels_are_whole(axis):
    w = RNG.normal(size=(6, 8, 4)).astype("float32")
    mask = pruned_by(prune.magnitude(0.5, structure=prune.channels(axis)), w)
    others = tuple(a for a in range(3) if a != axis % 3)
    mean = np.abs(w).mean(others)
    want = mean >= np.sort(mean)[len(mean) // 2]
    np.testing.assert_array_equal(mask.all(others), want)
    np.testing.assert_array_equal(mask.any(others), want)


def test_heads_are_runs_of_channels():
    w = RNG.normal(size=(6, 12)).astype("float32")
    mask = pruned_by(prune.magnitude(0.5, structure=prune.channels(-1, 3)), w)
    mean = np.abs(w).reshape(6, 4, 3).mean((0, 2))
    want = np.repeat(mean >= np.sort(mean)[2], 3)
    np.testing.assert_array_equal(mask, np.broadcast_to(want, (6, 12)))


def test_layers_of_a_stack_have_their_own_count():
    w = RNG.normal(size=(3, 4, 5)).astype("float32") * np.float32([1, 10, 100])[:, None, None]
    together = pruned_by(prune.magnitude(0.5), w)
    assert together.sum((1, 2)).tolist() != [10, 10, 10] and together.sum() == 30
    apart = pruned_by(prune.magnitude(0.5, per_layer="w"), w)
    for mask, layer in zip(apart, np.abs(w)):
        np.testing.assert_array_equal(mask, layer >= np.sort(layer, None)[10])


def test_global_is_one_threshold():
    params = {"a": RNG.normal(size=(4, 5)), "b": 3 * RNG.normal(size=(6, 5)), "c": np.ones(3)}
    params = jax.tree.map(jnp.float32, params)
    tx = prune.magnitude(0.6, distribution="global")
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    masks = prune.masks(state)
    both = np.abs(np.concatenate([np.ravel(params["a"]), np.ravel(params["b"])]))
    bound = np.sort(both)[30]
    for name in "ab":
        np.testing.assert_array_equal(masks[name], np.abs(params[name]) >= bound)
    assert masks["c"].shape == () and masks["c"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.magnitude(1.0), r"sparsity=1.0: .* at least 0 and less than 1"),
        (lambda: prune.magnitude(-0.1), r"sparsity=-0.1"),
        (lambda: prune.magnitude(90), r"90 % is 0.9"),
        (lambda: prune.cubic(0, 0.5, 10, 10), r"begin=10, end=10.*ends before it begins"),
        (lambda: prune.cubic(0, 1.5, 0, 10), r"final=1.5"),
        (lambda: prune.one_shot(0.5, -1), r"steps are counted from 0"),
        (lambda: prune.magnitude(0.5, every=0), r"every=0: expected a number of steps"),
        (lambda: prune.magnitude(0.5, distribution="erc"), r"'erc' is none of 'uniform', 'erk'"),
        (lambda: prune.nm(4, 2), r"nm\(4, 2\): N of every M weights are kept"),
        (lambda: prune.nm(2, 4, begin=5, end=3), r"begin=5, end=3.*ends before it begins"),
        (lambda: prune.rigl(0.9, growth="dense"), r"growth='dense'"),
        (lambda: prune.rigl(0.9, distribution="global"), r"these start at random"),
        (lambda: prune.rigl(0.9, drop=1.5), r"drop=1.5"),
        (lambda: prune.set(0.9, end=0), r"end=0"),
        (lambda: prune.blocks(0, 4), r"at least 1"),
    ],
)
def test_bad_settings_are_errors_at_once(call, message):
    with pytest.raises(jc.RecipeError, match=message):
        call()


PARAMS = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, "step": jnp.int32(0)}


@pytest.mark.parametrize(
    ("pruner", "error", "message"),
    [
        (prune.magnitude(0.5, pattern="dens/*"), jc.RecipeError, "'dens/\\*' .*`dense/kernel`"),
        (prune.magnitude(0.5, exclude="*/scale"), jc.RecipeError, "exclude='\\*/scale' matches no"),
        (prune.magnitude(0.5, pattern="*/bias"), jc.RecipeError, "`dense/bias` .* it has 1 axes"),
        (prune.magnitude(0.5, pattern="step"), jc.RecipeError, "no array of floating-point"),
        (prune.magnitude(0.5, exclude="*"), jc.RecipeError, "it is excluded"),
        (prune.nm(2, 4), jc.SiteError, r"groups of 4 do not divide axis -2 of `dense/kernel`"),
        (prune.nm(2, 4, axis={"x": 0}), jc.RecipeError, "no entry for `dense/kernel`"),
        (
            prune.magnitude(0.5, structure=prune.blocks(4, 4)),
            jc.SiteError,
            r"units of \[4, 4\] weights do not divide `dense/kernel` \[6, 4\]",
        ),
        (
            prune.magnitude(0.5, distribution="global", per_layer="*/kernel", min_ndim=1),
            jc.RecipeError,
            "one threshold for everything",
        ),
        (
            prune.magnitude(0.5, distribution="global", structure=prune.blocks(2, 2)),
            jc.RecipeError,
            "compares single weights",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_of_init(pruner, error, message):
    with pytest.raises(error, match=message):
        pruner.init(PARAMS)


def test_biases_are_pruned_where_it_is_asked_for():
    tx = prune.magnitude(0.5, min_ndim=1)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert prune.masks(state)["dense"]["bias"].tolist() == [True, True, False, False]


def test_apply_masks_and_sparsity():
    params = {"w": jnp.array([[1.0, -2.0], [jnp.inf, 4.0]]), "b": jnp.zeros(2), "n": None}
    masks = {"w": jnp.array([[True, False], [False, True]]), "b": True, "n": None}
    new = prune.apply_masks(params, masks)
    assert new["w"].tolist() == [[1, 0], [0, 4]] and new["b"] is params["b"]
    assert prune.sparsity(new) == prune.sparsity(masks) == 0.5
    assert prune.sparsity(new, min_ndim=1) == 4 / 6
    assert float(jax.jit(prune.sparsity)(new)) == 0.5
    assert prune.sparsity({"b": jnp.zeros(2)}) == 0.0
    with pytest.raises(jc.JaxCompressError, match="structure of the parameters"):
        prune.apply_masks(params, {"w": masks["w"]})
    with pytest.raises(jc.JaxCompressError, match=r"is float32\[2, 2\], expected bool\[2, 2\]"):
        prune.apply_masks(params, masks | {"w": jnp.ones((2, 2))})
    with pytest.raises(jc.JaxCompressError, match=r"is bool\[2\], expected bool\[2, 2\]"):
        prune.apply_masks(params, masks | {"w": jnp.ones(2, bool)})
