# SPDX-License-Identifier: Apache-2.0
"""The axes of inputs of weights in layouts whose axes are known by construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import prune


def ones(*shape):
    return jnp.ones(shape)


def conv(spec):
    return lambda p, x: lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", spec, "NHWC")
    )


def layers(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w.T), None), x, p["w"])[0]


IMAGE = ones(1, 5, 5, 4)
CASES = {
    "in, out": (lambda p, x: x @ p["w"], (4, 6), ones(2, 4), -2),
    "out, in": (lambda p, x: x @ p["w"].T, (6, 4), ones(2, 4), -1),
    "cast": (lambda p, x: x @ p["w"].astype(jnp.bfloat16).T, (6, 4), ones(2, 4), -1),
    "in, heads, width": (
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["w"]),
        (4, 2, 3),
        ones(2, 4),
        -3,
    ),
    "heads, width, out": (
        lambda p, x: jnp.einsum("bhk,hko->bo", x, p["w"]),
        (2, 4, 3),
        ones(2, 2, 4),
        -2,
    ),
    "flattened": (lambda p, x: x @ p["w"].reshape(8, 3), (2, 4, 3), ones(2, 8), -2),
    "stacked": (layers, (3, 4, 4), ones(2, 4), -1),
    "HWIO": (conv("HWIO"), (3, 3, 4, 6), IMAGE, -2),
    "OIHW": (conv("OIHW"), (6, 4, 3, 3), IMAGE, -3),
}


@pytest.mark.parametrize("name", CASES)
def test_axis_is_that_of_the_inputs(name):
    fn, shape, x, axis = CASES[name]
    assert prune.contracted_axes(fn)({"w": ones(*shape)}, x) == {"w": axis}


def test_nm_lies_along_it():
    w = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
    params, fn = {"w": jnp.asarray(w)}, lambda p, x: x @ p["w"].T
    tx = prune.nm(2, 4, axis=prune.contracted_axes(fn)(params, ones(2, 8)))
    _, state = tx.update({"w": jnp.zeros_like(w)}, tx.init(params), params)
    assert (np.asarray(prune.masks(state)["w"]).reshape(6, 2, 4).sum(-1) == 2).all()


def test_two_uses_that_disagree_are_an_error():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T  # noqa: E731
    with pytest.raises(jc.SiteError, match="`w` sums over axis -2 of `w` and `w#1` over axis -1"):
        prune.contracted_axes(fn)({"w": ones(4, 6)}, ones(2, 4))


def test_what_is_read_by_a_lookup_only_has_none():
    fn = lambda p, i: p["table"][i] @ p["w"]  # noqa: E731
    params = {"table": ones(5, 4), "w": ones(4, 3)}
    found = prune.contracted_axes(fn)(params, jnp.array([1, 2]))
    assert found == {"w": -2}
    with pytest.raises(jc.RecipeError, match="axis= has no entry for `table`"):
        prune.nm(2, 4, axis=found).init(params)
    assert jax.tree.structure(prune.nm(2, 4, axis=found, exclude="table").init(params))
