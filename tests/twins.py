# SPDX-License-Identifier: Apache-2.0
"""Fake quantization by hand, with jax.numpy alone: what every transform is compared with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._core._compat import inner_jaxprs, open_jaxpr

# Where JAX or XLA adds the same numbers in another order (fusion inside a loop, cotangents that
# meet), results differ by the rounding of float32: a few times 2**-24 of the largest value.
ROUNDING = 1e-6


def fake(x: jax.Array, axis: int | tuple[int, ...] | None, top: float = 127.0) -> jax.Array:
    """round(x / s) * s with s = max|x| / top over `axis`, and a straight-through gradient."""

    @jax.custom_jvp
    def f(x):
        v = x.astype(jnp.float32)
        absmax = jnp.max(jnp.abs(v), axis=axis, keepdims=True)
        s = jnp.where(absmax == 0, 1.0, absmax / top)
        return (jnp.clip(jnp.round(v / s), -top, top) * s).astype(x.dtype)

    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return f(x)


def weight(w: jax.Array, axis: int | tuple[int, ...] = 0) -> jax.Array:
    """int8 per channel: one scale for all values that one output sums over."""
    return fake(w, axis)


def token(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """int8 per token: one scale for all values that one output sums over."""
    return fake(x, axis)


def assert_same(got, want, tolerance: float = 0.0) -> None:
    """Every leaf of `got` is within `tolerance` of `want`, relative to its largest value."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        if not np.issubdtype(np.asarray(a).dtype, np.inexact) and a.dtype != jnp.bfloat16:
            np.testing.assert_array_equal(a, b)
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        bound = tolerance * max(np.max(np.abs(b), initial=0.0), 1e-30)
        error = np.max(np.abs(a - b), initial=0.0)
        assert error <= bound, f"error {error:.3g} above {bound:.3g}"
        assert np.isfinite(b).all(), "the twin itself is not finite"


def values_and_gradients(f, *args):
    """Result and gradients of the sum of squares for what floats among the first two arguments."""

    def loss(*args):
        return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in jax.tree.leaves(f(*args)))

    wrt = tuple(i for i, a in enumerate(args[:2]) if all(map(floats, jax.tree.leaves(a))))
    return jax.jit(lambda *args: (f(*args), jax.grad(loss, argnums=wrt)(*args)))(*args)


def floats(x) -> bool:
    """Whether a leaf can be differentiated."""
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def assert_twins(
    transformed, twin, *args, tolerance: float = 0.0, gradient: float | None = None
) -> None:
    """Values and gradients of a transformed function equal those of its hand-written twin.

    `gradient` is the tolerance of the gradients alone, where it differs.
    """
    values, grads = values_and_gradients(transformed, *args)
    want, want_grads = values_and_gradients(twin, *args)
    assert_same(values, want, tolerance)
    assert_same(grads, want_grads, tolerance if gradient is None else gradient)


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    """Standard normal values, the same for the same seed."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)  # nothing to compile
    return jax.device_put(values.astype(dtype))


def draw(seed: int, *shape: int) -> jax.Array:
    """`normal` with the seed first."""
    return normal(*shape, seed=seed)


def names(fn, *args, argnums=0) -> list[str]:
    """Names of all sites of a function."""
    return [site.name for site in jc.sites(fn, argnums)(*args)]


def big_floats(jaxpr, size):
    """Shapes of the float arrays of that many values that a jaxpr makes, inner jaxprs included."""
    found = []
    for eqn in jaxpr.eqns:
        avals = [v.aval for v in eqn.outvars]
        found += [
            a.shape for a in avals if a.size >= size and a.dtype in (jnp.float32, jnp.bfloat16)
        ]
        for inner in inner_jaxprs(eqn.params):
            found += big_floats(open_jaxpr(inner)[0], size)
    return found


def default(cases, *kept: str, name=str) -> list:
    """Cases of `parametrize` of which the default run takes these; `-m full` takes the rest."""
    assert {*kept} <= {name(case) for case in cases}, kept
    return [
        case if name(case) in kept else pytest.param(case, marks=pytest.mark.full) for case in cases
    ]


# A recipe of each kind.
RECIPES = ("w8a8", "w4a8-g32", "mxfp8", "nvfp4", "nf4", "ternary", "w8a8-static", "lsq-w4a4")
# Formats that differ from another one in a constant only.
ALIKE = ("_full", "_round", "uint2", "uint3", "uint5", "uint6", "uint7", "int5", "int7", "p1", "p2")
ALIKE += ("p5", "p6", "p7", "e5m2fnuz", "e4m3b11fnuz")


def different(fmts) -> list:
    """Formats, or their names, as cases: `-m full` takes all, the default run those that differ."""

    def name(fmt):
        return str(getattr(fmt, "name", fmt))

    return default(fmts, *(n for n in map(name, fmts) if not n.endswith(ALIKE)), name=name)
