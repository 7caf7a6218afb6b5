# SPDX-License-Identifier: Apache-2.0
"""The scalings that are found span exactly those that exist: compared with a numeric null space."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from nets import Draw, attend, conv, heads, layernorm, rope

from jaxcompress._core.channels.graph import channel_graph
from jaxcompress._core.channels.scaling import OWN, Scaling
from jaxcompress._core.channels.terms import blocks


def act(x):
    """Homogeneous, and never dead: a dead ReLU frees its channel, but not for every input."""
    return jax.nn.leaky_relu(x, 0.1)


def norm(x, g):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 0.1) * g


def mlp(p, x):
    return act(act(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]


def gelu(p, x):
    return jax.nn.gelu(x @ p["a"] + p["b"]) @ p["c"]


def block(p, x):
    y = norm(x, p["g"])
    q, k, v = heads(y @ p["q"], 4), heads(y @ p["k"], 2), heads(y @ p["v"], 2)
    a = attend(rope(q), jnp.repeat(rope(k), 2, 2), jnp.repeat(v, 2, 2))
    x = x + a @ p["o"]
    a, b = jnp.split(norm(x, p["h"]) @ p["wi"], 2, -1)
    return x + jax.nn.silu(a) * b @ p["d"]


def post_norm(p, x):
    for n in "12":
        y = x + act(x @ p["u" + n]) @ p["d" + n]
        x = layernorm(y, p["g" + n], p["b" + n])
    return x @ p["h"]


def stacked(p, x):
    def body(c, q):
        return c + act(layernorm(c, q["g"], q["b"]) @ q["u"]) @ q["d"], None

    return lax.scan(body, x, p)[0]


def cnn(p, x):
    x = act(conv(x, p["c"]) * p["s"] + p["b"])
    return conv(act(conv(x, p["dw"], groups=5) + p["e"]), p["pw"]).mean((1, 2)) @ p["h"]


d = Draw(40)
NETS = {  # name: function, parameters, shape of an input, dimension worked out by hand
    "mlp": (mlp, {"a": d(4, 5), "b": d(5), "c": d(5, 6), "d": d(6, 3)}, (2, 4, 4), 5 + 6),
    "gelu": (gelu, {"a": d(4, 5), "b": d(5), "c": d(5, 6)}, (2, 4, 4), 0),
    # Two norms 4 each, q with k 2 key heads x 2 rotary pairs, v with o 2 x 4, gated unit 5.
    "block": (
        block,
        {"g": d.near_one(4), "q": d(4, 16), "k": d(4, 8), "v": d(4, 8), "o": d(16, 4)}
        | {"h": d.near_one(4), "wi": d(4, 10), "d": d(5, 4)},
        (2, 4, 4),
        25,
    ),
    "post_norm": (
        post_norm,
        {"u1": d(4, 3), "d1": d(3, 4), "u2": d(4, 3), "d2": d(3, 4), "h": d(4, 5)}
        | {"g1": d.near_one(4), "b1": d(4), "g2": d.near_one(4), "b2": d(4)},
        (2, 4, 4),
        3 + 3 + 4,
    ),
    "stacked": (
        stacked,
        {"u": d(1, 4, 6), "d": d(1, 6, 4), "g": d.near_one(1, 4), "b": d(1, 4)},
        (2, 4, 4),
        4 + 6,
    ),
    "cnn": (
        cnn,
        {"c": d(1, 1, 3, 5), "s": d.near_one(5), "b": d(5, scale=0.2), "h": d(4, 3)}
        | {"dw": d(1, 2, 1, 5, scale=1.0), "e": d(5, scale=0.2), "pw": d(1, 1, 5, 4)},
        (4, 3, 3, 3),
        5 + 5 + 5 + 4,
    ),
}


def directions(fn, params, x):
    """Every scaling that is found, as directions of the logarithms of all entries."""
    graph = channel_graph(fn, 0, (params, x), {})
    flat = jax.tree.leaves(params)
    start = np.cumsum([0] + [w.size for w in flat])
    spaces = {
        frozenset(part)
        for dims in graph.dims
        for t in dims
        for b in blocks(t)
        for count in range(1, len(b.leaves) + 1)
        for part in itertools.combinations(b.leaves, count)
    }
    rows = []
    for space in map(tuple, spaces):
        scaling = Scaling(graph, space)
        for v in scaling.basis:
            for index in itertools.product(*(range(leaf.size) for leaf in space)):
                row = np.zeros(start[-1])
                for (number, cell, slot), e in ((s, e) for s, e in v.items() if s[0] != OWN):
                    mask = np.zeros(flat[number].shape)
                    places = []
                    for axis, (t, c) in enumerate(zip(graph.dims[number], cell)):
                        b, at = blocks(t)[c], np.zeros((), int)
                        for k, (leaf, stride) in enumerate(zip(b.leaves, b.strides)):
                            fixed = [index[j] for j, s in enumerate(slot) if s == (axis, k)]
                            steps = np.asarray(fixed or range(leaf.size))
                            at = np.add.outer(at, steps * stride)
                        places.append(at.ravel() + b.offset)
                    mask[np.ix_(*places)] = float(e)
                    row[start[number] : start[number + 1]] += mask.ravel()
                rows.append(row)
    return np.stack(rows) if rows else np.zeros((1, start[-1]))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "block" else n for n in NETS]
)
def test_the_null_space_is_complete(name):
    with jax.enable_x64(True):
        fn, params, shape, want = NETS[name]
        params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        xs = np.random.default_rng(1).normal(size=(12, *shape))
        flat, tree = jax.tree.flatten(params)
        start = np.cumsum([0] + [w.size for w in flat])

        def out(log, x):
            parts = [log[a:b].reshape(w.shape) for w, a, b in zip(flat, start, start[1:])]
            scaled = [w * jnp.exp(s) for w, s in zip(flat, parts)]
            return fn(jax.tree.unflatten(tree, scaled), x).ravel()

        J = jax.jit(jax.vmap(jax.jacrev(out), (None, 0)))(jnp.zeros(start[-1]), xs)
        J = np.asarray(J).reshape(-1, start[-1])
        columns = []  # scale one index along one dimension of one parameter
        for w, a in zip(flat, start):
            for axis in range(w.ndim):
                for j in range(w.shape[axis]):
                    column = np.zeros(start[-1])
                    index = np.arange(w.size).reshape(w.shape).take(j, axis)
                    column[a + index.ravel()] = 1
                    columns.append(column)
        A = np.stack(columns, 1)
        _, s, vt = np.linalg.svd(J @ A)
        null = A @ vt[(s > 1e-7 * s[0]).sum() :].T
        ours = directions(fn, params, jnp.asarray(xs[0]))
        both = np.vstack([null.T, ours])
        assert [np.linalg.matrix_rank(m, tol=1e-8) for m in (null, ours, both)] == [want] * 3
