# SPDX-License-Identifier: Apache-2.0
"""Every rule of the ONNX exporter: onnxruntime computes what JAX computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from jax import lax

import jaxcompress as jc

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
Y = RNG.normal(size=(3, 4)).astype(np.float32)
P = np.abs(X) + 0.1
UNIT = np.tanh(X)
I, J = (RNG.integers(-9, 9, (3, 4), np.int32) for _ in range(2))  # noqa: E741
B, C = X > 0, Y > 0
U = RNG.integers(0, 200, (3, 4)).astype(np.uint32)
T3 = RNG.normal(size=(2, 5, 6)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 7, 8, 4)).astype(np.float32)
IDS = RNG.integers(0, 5, (2, 3), np.int32)
TABLE = RNG.normal(size=(5, 6)).astype(np.float32)


def conv(x, w, strides=(1, 1), padding="SAME", groups=1, **dilations):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups, **dilations,
    )  # fmt: skip


def kernel(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def pool(x, init, op, window, strides, padding="VALID", **dilation):
    return lax.reduce_window(x, init, op, window, strides, padding, **dilation)


def gru(x):
    w = kernel(4, 4)

    def cell(h, v):
        h = jnp.tanh(v @ w + h)
        return h, h.sum()

    return lax.scan(cell, jnp.zeros(4), x)


def counted(x):
    return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 1.1 + c[0]), (0, x))


@jax.custom_vjp
def custom(x):
    return x * 3


custom.defvjp(lambda x: (x * 3, None), lambda _, g: (g,))

CASES = {
    **{
        name: (getattr(jnp, name), (X,))
        for name in "exp sin cos tan sinh cosh arctan arcsinh tanh floor ceil sign abs".split()
    },
    **{name: (getattr(jnp, name), (P,)) for name in "log sqrt cbrt log1p square".split()},
    **{name: (getattr(jnp, name), (UNIT,)) for name in "arcsin arccos arctanh".split()},
    **{name: (getattr(lax, name), (P,)) for name in "rsqrt logistic erf erfc exp2".split()},
    "arccosh": (jnp.arccosh, (P + 1,)),
    "expm1": (jnp.expm1, (np.array([1e-7, -1e-7, 0.5, -3.0, 20.0], np.float32),)),
    "log1p of small numbers": (jnp.log1p, (np.array([1e-8, -1e-7, 0.0, 3.0, np.inf], np.float32),)),
    "negation": (lambda x: -x, (X,)),
    "half to even": (jnp.round, (np.array([0.5, 1.5, -2.5, 2.4], np.float32),)),
    "half away from zero": (
        lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
        (np.array([0.5, -0.5, 1.5, 2.5, -2.4], np.float32),),
    ),
    **{name: (getattr(jnp, name), (X, Y)) for name in "add subtract multiply divide".split()},
    **{name: (getattr(jnp, name), (X, Y)) for name in "maximum minimum arctan2".split()},
    "arctan2 on the axes": (
        jnp.arctan2,
        (np.float32([1, -1, 0, 0, 2]), np.float32([0, 0, 1, -1, -2])),
    ),
    "power": (jnp.power, (P, Y)),
    "remainder": (lax.rem, (X, P)),
    "integers": (lambda a, b: (a + b) * 2 - lax.div(a, b * b + 1) + lax.rem(a, b * b + 1), (I, J)),
    "comparisons": (lambda a, b: (a == b, a != b, a < b, a <= b, a > b, a >= b), (I, J)),
    "logic": (lambda a, b: (a & b, a | b, a ^ b, ~a), (B, C)),
    "bits": (lambda a, b: (a & b, a | b, a ^ b, ~a), (I, J)),
    "shifts": (lambda a: (a << 3, a >> 2), (U,)),
    "powers": (lambda x: (x**2, x**3, x**5, x**-1, x**-2), (P,)),
    "signed shifts": (lambda i: (i >> 2, lax.shift_right_arithmetic(i, 1)), (I,)),
    "is finite": (jnp.isfinite, (np.array([1, np.inf, np.nan], np.float32),)),
    "casts": (lambda x: (x.astype(jnp.int32), x.astype(bool), x.astype(jnp.float16)), (X * 3,)),
    "where": (jnp.where, (B, X, Y)),
    "select of three": (lambda i, a, b: lax.select_n(i % 3, a, b, a + b), (np.abs(I), X, Y)),
    "clip": (lambda x: jnp.clip(x, -0.3, 0.4), (X,)),
    "clip to arrays": (lambda x, y: lax.clamp(y - 0.1, x, y + 0.1), (X, Y)),
    "relu": (jax.nn.relu, (X,)),
    "gelu": (jax.nn.gelu, (X,)),
    "exact gelu": (functools.partial(jax.nn.gelu, approximate=False), (X,)),
    "softmax": (jax.nn.softmax, (X,)),
    "log softmax": (jax.nn.log_softmax, (X,)),
    "softplus": (jax.nn.softplus, (X * 10,)),
    "silu": (jax.nn.silu, (X,)),
    "stop gradient": (lambda x: lax.stop_gradient(x) + 1, (X,)),
    "custom derivative": (custom, (X,)),
    "remat": (jax.checkpoint(lambda x: jnp.sin(x) * 2), (X,)),
    "reshape": (lambda x: x.reshape(4, 3), (X,)),
    "ones in and out": (lambda x: x[:, None, :, None].squeeze(1) + x.reshape(3, 4, 1), (X,)),
    "transposes": (lambda x: x.transpose(2, 0, 1) * x.transpose(2, 0, 1).reshape(6, 2, 5), (T3,)),
    "broadcast": (lambda x, y: x[:, None] + y[None], (X, Y)),
    "broadcast result": (lambda x: jnp.broadcast_to(x[0, 0], (2, 3)), (X,)),
    "broadcast row": (lambda x: jnp.broadcast_to(x[0], (2, 4)).T, (X,)),
    "reverse": (lambda x: x[::-1, ::-1], (X,)),
    "slices": (lambda x: x[1:, 0:4:2], (X,)),
    "concatenation": (lambda x, y: jnp.concatenate([x, y, np.ones((3, 1), np.float32)], 1), (X, Y)),
    "splits": (lambda x: jnp.split(x, [1, 3], 1), (X,)),
    "stack": (lambda x, y: jnp.stack([x, y], 1), (X, Y)),
    "tiles": (lambda x: jnp.tile(x, (2, 1, 3)), (X,)),
    "unstack": (lambda x: jnp.unstack(x, axis=1), (X,)),
    "logarithms": (lambda x: (jnp.log2(x), jnp.log10(x)), (P,)),
    "roughly the largest": (lambda x: lax.approx_max_k(x, 2), (X,)),
    "subtract at": (lambda x, i: x.at[i].subtract(1.0), (X, np.array([2, 2, 9], np.int32))),
    "pad": (lambda x: jnp.pad(x, ((1, 0), (2, 3)), constant_values=2.0), (X,)),
    "pad between and cut": (lambda x: lax.pad(x, 0.5, ((-1, 2, 1), (1, -1, 2))), (X,)),
    "sums": (lambda x: (x.sum(), x.sum(1), x.mean((0, 2)), x.prod(2)), (T3,)),
    "extremes": (lambda x: (x.max(1), x.min((0, 1)), x.argmax(1), x.argmin(2)), (T3,)),
    "all and any": (lambda b: (b.all(), b.any(1)), (B,)),
    "sum of what is broadcast": (lambda x: jnp.broadcast_to(x[:, None], (3, 5, 4)).sum(1), (X,)),
    "reduction after a transpose": (lambda x: x.transpose(2, 0, 1).sum(0), (T3,)),
    "cumulative sums": (lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 0, reverse=True)), (X,)),
    "running": (
        lambda x: (jnp.cumprod(x, 1), lax.cummax(x, 0), lax.cummin(x, 1, reverse=True)),
        (X,),
    ),
    "sort": (lambda x: (jnp.sort(x, 0), jnp.argsort(x, 1)), (X,)),
    "sort by a key": (lambda a, x: lax.sort((a, x), num_keys=1), (I, X)),
    "stable sort of equal keys": (lambda i: jnp.argsort(i // 4, axis=1), (I,)),
    "top k": (lambda x: lax.top_k(x, 2), (X,)),
    "rows of a table": (lambda ids, t: t[ids], (IDS, TABLE)),
    "rows outside": (
        lambda ids, t: (jnp.take(t, ids, axis=0), jnp.take(t, ids, axis=0, mode="clip")),
        (np.array([0, 4, 5, -1, -7], np.int32), TABLE),
    ),
    "columns": (lambda ids, t: jnp.take(t, ids, axis=1), (IDS, TABLE)),
    "along an axis": (lambda x, i: jnp.take_along_axis(x, i % 4, 1), (X, np.abs(I))),
    "pairs of places": (lambda x, i: x[i % 3, i], (X, np.array([0, 2, 1], np.int32))),
    "windows at places": (
        lambda x, i: jax.vmap(lambda s: lax.dynamic_slice(x, (s, 1), (2, 2)))(i),
        (X, np.array([0, 1, 5], np.int32)),
    ),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i, 1), (2, 3)), (X, np.int32(7))),
    "dynamic update": (
        lambda x, i: lax.dynamic_update_slice(x, x[:2, :3] * 0, (i, 0)),
        (X, np.int32(1)),
    ),
    "set": (lambda x, i: x.at[i].set(9.0), (X, np.array([2, 7], np.int32))),
    "add at": (lambda x, i: x.at[i, i].add(1.0), (X, np.array([2, 2, 1], np.int32))),
    "max at": (lambda x, i: x.at[:, i].max(0.5), (X, np.array([0, 3], np.int32))),
    "counts": (lambda i: jnp.zeros(9).at[i].add(1.0), (np.array([1, 1, 8, 9], np.int32),)),
    "product": (lambda x, y: x @ y.T, (X, Y)),
    "vectors": (lambda x, y: (x[0] @ y[0], x @ y[0], x[0] @ y.T), (X, Y)),
    "batched product": (lambda x: jnp.einsum("bij,bkj->bik", x, x), (T3,)),
    "many axes": (lambda x: jnp.einsum("bij,cij->bc", x, x), (T3,)),
    "outer": (lambda x: jnp.einsum("bij,ckl->bicjkl", x, x), (T3,)),
    "heads": (lambda x: jnp.einsum("bthk,bshk->bhts", *[x.reshape(2, 5, 2, 3)] * 2), (T3,)),
    "batch in the middle": (lambda x: jnp.einsum("ibj,kbj->bik", x, x), (T3,)),
    "weight on the left": (lambda x: jnp.einsum("ki,bij->bkj", kernel(7, 5), x), (T3,)),
    "integer product": (
        lambda a, b: lax.dot(a, b.T, preferred_element_type=jnp.int32),
        (I.astype(np.int8), J.astype(np.int8)),
    ),
    "wide integer product": (lambda a, b: a @ b.T, (I, J)),
    "half to single": (
        lambda a: lax.dot(a, a.T, preferred_element_type=jnp.float32),
        (X.astype(np.float16),),
    ),
    "ragged product": (
        lambda x: lax.ragged_dot(x, kernel(3, 4, 5), jnp.array([1, 0, 2], jnp.int32)),
        (X,),
    ),
    "conv": (lambda x: conv(x, kernel(3, 3, 4, 6)), (IMAGE,)),
    "conv chain": (
        lambda x: conv(jax.nn.relu(conv(x, kernel(3, 3, 4, 6)) + 1), kernel(1, 1, 6, 2)),
        (IMAGE,),
    ),
    "strides and padding": (
        lambda x: conv(x, kernel(3, 2, 4, 6), (2, 1), [(1, 0), (2, 1)]),
        (IMAGE,),
    ),
    "dilations": (lambda x: conv(x, kernel(3, 3, 4, 6), rhs_dilation=(2, 1)), (IMAGE,)),
    "groups": (lambda x: conv(x, kernel(3, 3, 2, 6), groups=2), (IMAGE,)),
    "depthwise": (lambda x: conv(x, kernel(3, 3, 1, 8), groups=4), (IMAGE,)),
    "transposed conv": (
        lambda x: lax.conv_transpose(x, kernel(3, 3, 4, 6), (2, 2), "SAME"),
        (IMAGE,),
    ),
    "conv in one dimension": (
        lambda x: lax.conv_general_dilated(
            x, kernel(3, 6, 2), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        (T3,),
    ),
    "integer conv": (
        lambda x: lax.conv_general_dilated(
            x, jnp.ones((2, 4, 3, 3), jnp.int8), (1, 1), "VALID", preferred_element_type=jnp.int32
        ),
        (RNG.integers(-99, 99, (1, 4, 5, 5)).astype(np.int8),),
    ),
    "max pooling": (lambda x: pool(x, -jnp.inf, lax.max, (1, 2, 3, 1), (1, 2, 2, 1)), (IMAGE,)),
    "min pooling": (
        lambda x: pool(x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"),
        (IMAGE,),
    ),
    "sum pooling": (lambda x: pool(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"), (IMAGE,)),
    "pooling of one axis": (lambda x: pool(x, -jnp.inf, lax.max, (2,), (2,)), (X[0],)),
    "dilated sums": (
        lambda x: pool(x, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), window_dilation=(1, 2, 3, 1)),
        (IMAGE,),
    ),
    "dilated pooling": (
        lambda x: pool(
            x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), window_dilation=(1, 2, 3, 1)
        ),
        (IMAGE,),
    ),
    "scan": (gru, (RNG.normal(size=(9, 4)).astype(np.float32),)),
    "scan backwards": (
        lambda x: lax.scan(lambda c, v: (c + v, c * v), jnp.zeros(4), x, reverse=True),
        (RNG.normal(size=(9, 4)).astype(np.float32),),
    ),
    "short scan": (lambda x: lax.scan(lambda c, v: (c + v, c), jnp.zeros(4), x), (X,)),
    "scan over nothing": (lambda x: lax.scan(lambda c, _: (c * 1.1, c.sum()), x, None, 7), (X,)),
    "scan in a scan": (
        lambda x: lax.scan(
            lambda c, v: lax.scan(lambda d, w: (d + w, d), c, jnp.ones((6, 4)) * v[None]),
            jnp.zeros(4), x,
        ),
        (RNG.normal(size=(5, 4)).astype(np.float32),),
    ),
    "while": (counted, (X,)),
    "for": (lambda x: lax.fori_loop(0, 6, lambda i, c: c + i * x, x), (X,)),
    "cond": (lambda i, x: lax.cond(i > 2, lambda a: a + 1, lambda a: a * 2, x), (np.int32(3), X)),
    "switch": (
        lambda i, x: lax.switch(i, [lambda a: a, lambda a: -a, lambda a: a * 2, jnp.sin], x),
        (np.int32(2), X),
    ),
    "switch outside": (
        lambda i, x: lax.switch(i, [lambda a: a, lambda a: -a, lambda a: a * 2], x),
        (np.int32(9), X),
    ),
    "constant result": (lambda x: (x, jnp.arange(3), 2.0), (X,)),
    "input as result": (lambda x, y: (y, x, x), (X, Y)),
    "by platform": (
        lambda x: lax.platform_dependent(x, cpu=lambda a: a + 1, default=lambda a: a - 1),
        (X,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_computes_what_jax_computes(name, tmp_path):
    fn, inputs = CASES[name]
    model = jc.export.onnx(lambda _, *xs: fn(*xs), {}, *inputs, path=tmp_path / "m.onnx")
    got = jax.tree.leaves(model.run(*inputs))
    want = jax.tree.leaves(jax.jit(fn)(*inputs))
    for a, b in zip(got, map(np.asarray, want), strict=True):
        assert a.dtype == b.dtype
        if b.dtype.kind == "f":
            scale = np.abs(b[np.isfinite(b)]).max(initial=1e-3)
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * scale)
        else:
            np.testing.assert_array_equal(a, b)


def test_bits_as_other_types(tmp_path):
    """From opset 26 on, which onnxruntime does not have yet."""
    fn = lambda _, x: (  # noqa: E731
        lax.bitcast_convert_type(x, jnp.int32),
        lax.bitcast_convert_type(x, jnp.int32) << 3,
        lax.shift_right_logical(lax.bitcast_convert_type(x, jnp.int32), 3),
    )
    model = jc.export.onnx(fn, {}, X, path=tmp_path / "m.onnx", opset=26)
    for a, b in zip(model.run(X, evaluator="reference"), fn({}, X), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(jc.ArtifactError, match="from opset 26 on"):
        jc.export.onnx(fn, {}, X, path=tmp_path / "m.onnx")


def test_negative_padding_cuts(tmp_path):
    """XLA reads past the image there on a CPU, so that the same is written with slices."""
    w = kernel(3, 3, 4, 6)
    fn = lambda _, x: conv(x, w, padding=[(-1, 1), (0, -2)])  # noqa: E731
    model = jc.export.onnx(fn, {}, IMAGE, path=tmp_path / "m.onnx")
    want = conv(IMAGE[:, 1:, :-2], w, padding=[(0, 1), (0, 0)])
    np.testing.assert_allclose(model.run(IMAGE), want, rtol=2e-5, atol=1e-5)


def test_every_rule_was_reached(monkeypatch, tmp_path):
    """What `onnx_primitives` lists is what the cases above go through."""
    from jaxcompress.export._onnx import convert

    reached = set()
    for table in (convert.RULES, convert.CONSTANT):
        for name, rule in list(table.items()):

            def spy(*args, name=name, rule=rule):
                reached.add(name)
                return rule(*args)

            monkeypatch.setitem(table, name, spy)
    for fn, inputs in CASES.values():
        jc.export.onnx(lambda _, *xs, fn=fn: fn(*xs), {}, *inputs, path=tmp_path / "m.onnx")
    # Names of other versions of JAX, what marks devices, and what only symbolic sizes reach.
    elsewhere = set(
        "pjit core_call closed_call custom_vjp_call_jaxpr checkpoint remat remat2 custom_lin "
        "ragged_dot ragged_dot_general copy copy_p pvary sharding_constraint optimization_barrier "
        "reduce_precision expand_dims add_any iota custom_partitioning shard_map platform_index "
        "scatter_add scatter_mul scatter_min scatter_max scatter-mul scatter-min exp2 square split "
        "bitcast_convert_type log2 stop_gradient jit custom_vjp_call custom_jvp_call clamp "
        "squeeze".split()
    )
    assert set(jc.export.onnx_primitives()) - reached - elsewhere == set()
    assert onnx.defs.onnx_opset_version() >= 25
