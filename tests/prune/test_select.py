# SPDX-License-Identifier: Apache-2.0
"""Selection against sorting in NumPy and the tables of jaxpruner (Apache-2.0, 2024)."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress._solvers.select import largest, n_of_m
from jaxcompress.prune._bits import Bits

RNG = np.random.default_rng(0)
SCORES = {
    "random": RNG.normal(size=(13, 21)).astype("float32"),
    "tied": RNG.integers(-2, 3, (13, 21)).astype("float32"),
    "equal": np.ones((13, 21), "float32"),
    "bfloat16": RNG.normal(size=(13, 21)).astype(ml_dtypes.bfloat16),
    "zeros of both signs": np.where(RNG.random((13, 21)) < 0.5, -0.0, 0.0).astype("float32"),
    "infinite": np.where(RNG.random((13, 21)) < 0.3, np.inf, -np.inf).astype("float32"),
    "subnormal": (RNG.integers(-3, 4, (13, 21)) * 1.4e-45).astype("float32"),
}


def first_largest(arrays, count):
    """Masks of the largest by a stable sort."""
    flat = np.concatenate([np.asarray(a, "float64").ravel() for a in arrays])
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    parts = np.split(mask, np.cumsum([a.size for a in arrays])[:-1])
    return [m.reshape(a.shape) for m, a in zip(parts, arrays)]


@pytest.mark.parametrize("name", SCORES)
def test_largest_is_a_stable_sort(name):
    scores = SCORES[name]
    choose = jax.jit(lambda x, k: largest([x], k)[0])
    for count in (0, 1, 7, 136, 272, 273):
        mask = np.asarray(choose(scores, count))
        assert mask.sum() == count
        if name != "subnormal":  # XLA may flush them to zero
            np.testing.assert_array_equal(mask, first_largest([scores], count)[0])


def test_nan_is_the_largest():
    scores = jnp.array([1.0, jnp.nan, jnp.inf])
    assert largest([scores], 1)[0].tolist() == [False, True, False]


def test_several_arrays_have_one_threshold():
    arrays = [SCORES["tied"], SCORES["tied"][:4, :5] + 1, SCORES["tied"].T]
    for count in (0, 1, 200, 400, 565):
        found = largest([jnp.asarray(a) for a in arrays], count)
        for mask, want in zip(found, first_largest(arrays, count)):
            np.testing.assert_array_equal(mask, want)


def test_float64_is_compared_in_float64():
    with jax.enable_x64(True):
        scores = jnp.array([1.0, 1.0 + 1e-12, 1.0 - 1e-12])
        assert largest([scores], 1)[0].tolist() == [False, True, False]


def test_under_vmap_each_row_has_its_count():
    scores = SCORES["tied"]
    found = jax.vmap(lambda x: largest([x], 5)[0])(jnp.asarray(scores))
    for row, mask in zip(scores, np.asarray(found)):
        np.testing.assert_array_equal(mask, first_largest([row], 5)[0])


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")])
def test_eight_devices_choose_the_same_and_gather_nothing(spec):
    shape, names = ((8,), ("x",)) if len(spec) < 2 or spec[0] is None else ((4, 2), ("x", "y"))
    mesh = Mesh(np.array(jax.devices()).reshape(shape), names)
    scores = RNG.integers(-9, 9, (64, 32)).astype("float32")
    split = jax.device_put(scores, NamedSharding(mesh, spec))
    choose = jax.jit(lambda x: largest([x], 700)[0])
    np.testing.assert_array_equal(choose(split), first_largest([scores], 700)[0])
    program = choose.lower(split).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program and "all-to-all" not in program


def brute_n_of_m(scores, n, m, axis):
    moved = np.moveaxis(np.asarray(scores, "float64"), axis, -1)
    groups = moved.reshape(-1, m)
    mask = np.zeros(groups.shape, bool)
    for row, group in zip(mask, groups):
        row[np.argsort(-group, kind="stable")[:n]] = True
    return np.moveaxis(mask.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 3)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_n_of_m_is_a_stable_sort_of_every_group(n, m, axis):
    for dtype in ("float32", ml_dtypes.bfloat16):
        scores = RNG.integers(-3, 4, (24, 24, 24)).astype(dtype)
        mask = jax.jit(n_of_m, static_argnums=(2, 3))(scores, n, m, axis)
        np.testing.assert_array_equal(mask, brute_n_of_m(scores, n, m, axis))


# jaxpruner, mask_calculator_test.py: SCORE_1 and its masks.
SCORE_1 = np.float32(
    [
        [[0.69, 0.37, 0.96, 0.81], [0.79, 0.55, 0.88, 0.53]]
        + [[0.66, 0.88, 0.4, 0.83], [0.13, 0.8, 0.91, 0.96]],
        [[0.34, 0.17, 0.07, 0.74], [0.13, 0.13, 0.83, 0.76]]
        + [[0.13, 0.92, 0.25, 0.75], [0.37, 0.42, 0.65, 0.46]],
    ]
)
UNSTRUCTURED_1 = [
    [[0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]],
    [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
]
TWO_OF_FOUR_1 = [
    [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
    [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1]],
]
TWO_OF_FOUR_AXIS_1 = [
    [[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1], [0, 1, 1, 1]],
    [[1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]],
]
SCORE_4 = [1, 0.5, 0.3, 0.2, 1, 1.5, 1.8, 2.0, 1, 1]
SCORE_BLOCKS = SCORE_1.reshape(-1, 4, 4).transpose(1, 0, 2).reshape(4, 8)


@pytest.mark.parametrize(
    ("scores", "kept", "mask"),
    [
        (SCORE_1, 32 - round(0.8 * 32), UNSTRUCTURED_1),
        ([1] * 8, 4, [1, 1, 1, 1, 0, 0, 0, 0]),
        (SCORE_4, 5, [1, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
        ([SCORE_4] * 2, 10, [[1, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]]),
    ],
)
def test_table_of_jaxpruner_unstructured(scores, kept, mask):
    np.testing.assert_array_equal(largest([jnp.float32(scores)], kept)[0], np.array(mask, bool))


def test_table_of_jaxpruner_n_of_m():
    np.testing.assert_array_equal(n_of_m(SCORE_1, 2, 4, -1), np.array(TWO_OF_FOUR_1, bool))
    np.testing.assert_array_equal(n_of_m(SCORE_1, 2, 4, 1), np.array(TWO_OF_FOUR_AXIS_1, bool))


@pytest.mark.parametrize("shape", [(7,), (3, 8), (2, 3, 9), (5, 1)])
def test_bits_are_the_mask(shape):
    mask = RNG.random(shape) < 0.5
    bits = Bits.of(jnp.asarray(mask))
    np.testing.assert_array_equal(bits.mask(), mask)
    np.testing.assert_array_equal(bits.packed, np.packbits(mask, axis=-1, bitorder="little"))
    assert jc.nbytes(bits) == np.prod(shape[:-1]) * -(-shape[-1] // 8)
