# SPDX-License-Identifier: Apache-2.0
"""Every network of `nets.py`, made smaller: equal to zeros in what was removed, and a function."""

import jax
import jax.numpy as jnp
import pytest
from nets import NETS
from test_emit import TOLERANCE, distance, zeroed
from twins import default

import jaxcompress as jc

# Zeros there change more than the channel: 0 / 0, the first expert chosen.
SPARE = {"weight_norm": ("v",)}
NOT_ZEROING = {  # centred norms mix the residual width, experts are chosen by it
    "gpt": "emb:1",
    "vit": "cls:0",
    "experts": "down:0",
}


def doubled(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("name", NETS)
def test_removing_equals_zeroing(name):
    """Half of every group at once, chosen at random; in float64, where the sums agree."""
    with jax.enable_x64(True):
        removing_equals_zeroing(name)


def removing_equals_zeroing(name):
    fn, params, inputs = NETS[name]()
    params, inputs = jax.tree.map(doubled, (params, inputs))
    groups = jc.prune.groups(fn)(params, *inputs)
    keep = {
        str(group.members[0]): 0.5
        for group in groups
        if not group.pinned
        and group.ordered != "the order of layers"
        and NOT_ZEROING.get(name) not in [str(m) for m in group.members]
    }
    small = jc.prune.shrink(
        fn, params, *inputs, keep=keep, importance=jc.prune.importance.random(3), mean="keep"
    )
    assert sum(row.kept < row.size for row in small.report.rows) == len(keep) > 0
    run = jax.jit(fn)
    want = run(zeroed(params, groups, small, SPARE.get(name, ())), *inputs)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(small.params))
    assert distance(small.fn(small.params, *inputs), want) < 1e-6
    assert distance(want, run(params, *inputs)) > 1e-3  # what was removed did something


@pytest.mark.parametrize("name", default(NETS, *[*NETS][::2]))
def test_the_small_function_is_a_function(name):
    """It is differentiated, mapped, traced and shrunk again, and takes other batches."""
    fn, params, inputs = NETS[name]()
    small = jc.prune.shrink(fn, params, *inputs, keep=0.5)
    out = small.fn(small.params, *inputs)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))
    if name == "experts":  # JAX does not map ragged_dot over this axis
        g = jax.jit(jax.grad(lambda p: jnp.sum(small.fn(p, *inputs) ** 2)))(small.params)
    elif name == "branches":  # a while loop has no reverse mode
        g = out
    else:

        @jax.jit
        @jax.vmap
        def mapped(*inputs):
            y, back = jax.vjp(lambda p: small.fn(p, *inputs), small.params)
            return y, *back(y)

        y, g = mapped(*(jnp.stack([x, x]) for x in inputs))
        assert distance(y[1], out) < TOLERANCE
        g = jax.tree.map(lambda x: x[1], g)
        assert jax.tree.map(jnp.shape, g) == jax.tree.map(jnp.shape, small.params)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(g))
    assert any(bool((x != 0).any()) for x in jax.tree.leaves(g))
    if name in ("mlp", "gpt", "mobile"):
        assert distance(small.fn(small.params, *(x[:1] for x in inputs)), out[:1]) < TOLERANCE
    again = jc.prune.shrink(small.fn, small.params, *inputs, keep=0.5)
    assert again.report.bytes[1] < small.report.bytes[1]


@pytest.mark.parametrize(
    "name", default(NETS, "gpt", "mobile", "lstm", "experts", "vit", "branches")
)
def test_a_size_may_be_open(name):
    """The small function is exported once for batches of every size."""
    fn, params, inputs = NETS[name]()
    axis = 1 if name in ("relu_rnn", "lstm", "gru") else 0  # the first is time
    (size,) = jax.export.symbolic_shape("batch")
    shapes = [
        jax.ShapeDtypeStruct(x.shape[:axis] + (size,) + x.shape[axis + 1 :], x.dtype)
        for x in inputs
    ]
    small = jc.prune.shrink(fn, params, *inputs, keep=0.5)
    exported = jax.export.export(jax.jit(small.fn))(small.params, *shapes)
    for count in (1, 3):
        batch = [jnp.concatenate([x] * count, axis) for x in inputs]
        found, want = exported.call(small.params, *batch), small.fn(small.params, *batch)
        assert distance(found, want) < TOLERANCE
