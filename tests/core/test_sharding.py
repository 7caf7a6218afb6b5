# SPDX-License-Identifier: Apache-2.0
"""Sharded functions on eight CPU devices equal the twin that is not sharded."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import quantize_aware
from tests.twins import ROUNDING, assert_same, assert_twins, normal, token, weight

# A collective adds the partial results of eight devices in another order than one matmul does;
# what is one device's matmul has another shape, and is summed in another order.
SUMS = 4 * ROUNDING

X, W = normal(8, 16, seed=1), normal(16, 24, seed=2)
MLP = {"up": normal(16, 32, seed=3), "down": normal(32, 16, seed=4)}
STACK = normal(3, 16, 16, seed=5) * 0.3


def mesh(*sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("d", "t")[: len(sizes)], axis_types=(kind,) * len(sizes))


def shard_map(f, in_specs, out_specs, sizes=(8,), **kwargs):
    return jax.shard_map(f, mesh=mesh(*sizes), in_specs=in_specs, out_specs=out_specs, **kwargs)


def dense_q(w, x):
    return token(x) @ weight(w)


def mlp_q(p, x):
    return dense_q(p["down"], jnp.tanh(dense_q(p["up"], x)))


@pytest.fixture(params=[True, False], ids=["check_vma", "no_check_vma"])
def vma(request):
    return {"check_vma": request.param}


# ---------------------------------------------------------------------- shard_map


def test_batch_is_sharded(vma):
    f = shard_map(lambda w, x: jnp.tanh(x @ w), (P(), P("d")), P("d"), **vma)
    twin = lambda w, x: jnp.tanh(dense_q(w, x))  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), twin, W, X, tolerance=SUMS)


def test_contracted_axis_is_sharded(vma):
    """The scale of a channel is that of the whole channel: the range is reduced by pmax."""
    f = shard_map(lambda w, x: lax.psum(x @ w, "d"), (P("d"), P(None, "d")), P(), **vma)
    assert_twins(quantize_aware(f, "w8a8"), dense_q, W, X, tolerance=SUMS)
    assert_twins(quantize_aware(f, "w8a16"), lambda w, x: x @ weight(w), W, X, tolerance=SUMS)
    (site,) = jc.sites(f)(W, X)
    assert [o.split_over(site.contracting(i)) for i, o in enumerate(site.operands)] == [("d",)] * 2


def test_contracted_axis_is_sharded_exactly():
    """Where no sums are involved, the scales are the same to the last bit: w is read back."""
    f = shard_map(
        lambda w, x: lax.psum_scatter(x @ w, "d", scatter_dimension=0, tiled=True),
        (P("d"), P(None, "d")),
        P("d"),
    )
    one = jnp.eye(16)
    got = jax.jit(quantize_aware(f, "w8a16"))(W, one)
    assert_same(got, jax.jit(lambda w: weight(w))(W))


def test_output_axis_is_sharded(vma):
    f = shard_map(lambda w, x: x @ w, (P(None, "d"), P()), P(None, "d"), **vma)
    assert_twins(quantize_aware(f, "w8a8"), dense_q, W, X, tolerance=SUMS)
    (site,) = jc.sites(f)(W, X)
    assert [o.split_over(site.contracting(i)) for i, o in enumerate(site.operands)] == [()] * 2


def test_column_then_row_parallel(vma):
    """The hidden activation is split along the axis that the second matmul sums over."""

    def f(p, x):
        return lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "d")

    specs = {"up": P(None, "d"), "down": P("d")}
    sharded = shard_map(f, (specs, P()), P(), **vma)
    assert_twins(quantize_aware(sharded, "w8a8"), mlp_q, MLP, X, tolerance=SUMS)


def test_batch_and_model_are_sharded(vma):
    def f(p, x):
        return lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "t")

    specs = {"up": P(None, "t"), "down": P("t")}
    sharded = shard_map(f, (specs, P("d")), P("d"), (2, 4), **vma)
    assert_twins(quantize_aware(sharded, "w8a8"), mlp_q, MLP, X, tolerance=SUMS)


def test_activations_with_biases_norms_and_reshapes_between():
    p = {**MLP, "bias": normal(32, seed=8)}

    def body(p, x):
        h = jax.nn.gelu(x @ p["up"] + p["bias"][None])
        h = h.reshape(8, 2, -1, 2).transpose(0, 2, 1, 3)  # heads, split where the axis was
        h = h.transpose(0, 2, 1, 3).reshape(8, -1)
        return lax.psum(h @ p["down"], "d")

    def twin(p, x):
        return dense_q(p["down"], jax.nn.gelu(dense_q(p["up"], x) + p["bias"][None]))

    # The shard of a device holds both of its halves: the reshape is within one device.
    specs = {"up": P(None, "d"), "down": P("d"), "bias": P("d")}
    f = shard_map(body, (specs, P()), P())
    assert_twins(quantize_aware(f, "w8a8"), twin, p, X, tolerance=SUMS)


def test_what_sizes_change_keeps_its_axes():
    """Split, top-k and pooling: tokens of other devices must not widen a token's scale."""

    def body(p, x):
        a, b = jnp.split(x @ p["up"], 2, axis=-1)
        h = a * jax.nn.sigmoid(b)
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID")
        return lax.psum(lax.top_k(h, 2)[0] @ p["down"], "t")

    def twin(p, x):
        devices = [token(x) @ weight(w) for w in jnp.split(p["up"], 4, 1)]
        halves = [jnp.split(d, 2, -1) for d in devices]
        h = [a * jax.nn.sigmoid(b) for a, b in halves]
        h = [lax.reduce_window(v, -jnp.inf, lax.max, (1, 2), (1, 2), "VALID") for v in h]
        h = jnp.concatenate([lax.top_k(v, 2)[0] for v in h], 1)
        return dense_q(p["down"], h)

    p = {"up": MLP["up"], "down": MLP["down"][:8]}
    specs = {"up": P(None, "t"), "down": P("t")}
    f = shard_map(body, (specs, P("d")), P("d"), (2, 4))
    assert_same(jax.jit(quantize_aware(f, "w8a8"))(p, X), jax.jit(twin)(p, X), SUMS)


def test_scan_over_layers_inside_shard_map(vma):
    def f(w, x):
        def layer(x, w):
            part = lax.axis_index("t") * 4
            x = lax.dynamic_slice_in_dim(x, part, 4, 1)
            return jnp.tanh(lax.psum(x @ w, "t")), None

        return lax.scan(layer, x, w)[0]

    sharded = shard_map(f, (P(None, "t"), P("d")), P("d"), (2, 4), check_vma=False)

    def token_parts(x):  # what a device slices itself, it quantizes by itself
        return jnp.concatenate([token(part) for part in jnp.split(x, 4, 1)], 1)

    def twin(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(token_parts(x) @ weight(w)), None), x, w)[0]

    assert_same(jax.jit(quantize_aware(sharded, "w8a8"))(STACK, X), jax.jit(twin)(STACK, X), SUMS)
    data_parallel = shard_map(
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
        (P(), P("d")),
        P("d"),
        **vma,
    )
    plain = lambda w, x: lax.scan(lambda x, w: (jnp.tanh(dense_q(w, x)), None), x, w)[0]  # noqa: E731
    assert_twins(quantize_aware(data_parallel, "w8a8"), plain, STACK, X, tolerance=SUMS)


def test_megatron_blocks_in_a_scan(vma):
    stack = jax.tree.map(lambda w: jnp.stack([w, 0.5 * w]), MLP)

    def body(p, x):
        def block(x, p):
            return x + lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "d"), None

        return lax.scan(block, x, p)[0]

    specs = {"up": P(None, None, "d"), "down": P(None, "d")}
    f = shard_map(body, (specs, P()), P(), **vma)
    twin = lambda p, x: lax.scan(lambda x, p: (x + mlp_q(p, x), None), x, p)[0]  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), twin, stack, X, tolerance=SUMS)


def test_weights_are_gathered_inside():
    """Fully sharded data parallelism: gathered along the contracted axis, then whole."""
    f = shard_map(
        lambda w, x: x @ lax.all_gather(w, "d", axis=0, tiled=True),
        (P("d"), P("d")),
        P("d"),
        check_vma=False,
    )
    assert_twins(quantize_aware(f, "w8a8"), dense_q, W, X, tolerance=SUMS)
    (site,) = jc.sites(f)(W, X)
    assert site.name == "arg0" and site.operands[1].split_over((0,)) == ()


def test_activations_are_gathered_and_scattered():
    def f(p, x):
        x = lax.all_gather(x, "d", axis=1, tiled=True)
        h = jnp.tanh(x @ p["up"])
        return lax.psum_scatter(h @ p["down"], "d", scatter_dimension=1, tiled=True)

    specs = {"up": P(None, "d"), "down": P("d")}
    sharded = shard_map(f, (specs, P(None, "d")), P(None, "d"))
    assert_twins(quantize_aware(sharded, "w8a8"), mlp_q, MLP, X, tolerance=SUMS)


def test_embedding_is_sharded_by_rows_and_by_features():
    table, ids = normal(16, 8, seed=6), jnp.arange(8)
    by_features = shard_map(lambda t, i: t[i], (P(None, "d"), P()), P(None, "d"))
    twin = lambda t, i: weight(t, 1)[i]  # noqa: E731
    assert_twins(quantize_aware(by_features, "w8a8"), twin, table, ids)

    def rows(t, i):
        local = i - lax.axis_index("d") * t.shape[0]
        mine = (local >= 0) & (local < t.shape[0])
        read = jnp.where(mine[:, None], t[jnp.clip(local, 0, t.shape[0] - 1)], 0.0)
        return lax.psum(read, "d")

    by_rows = shard_map(rows, (P("d"), P()), P())
    assert_twins(quantize_aware(by_rows, "w8a8"), twin, table, ids)


def test_manual_over_one_axis_of_two():
    """Manual over `t`; over `d` XLA shards as it likes."""
    f = jax.shard_map(
        lambda w, x: lax.psum(x @ w, "t"),
        mesh=mesh(2, 4),
        in_specs=(P("t"), P(None, "t")),
        out_specs=P(),
        axis_names={"t"},
    )
    x = jax.device_put(X, NamedSharding(mesh(2, 4), P("d")))
    assert_twins(quantize_aware(f, "w8a8"), dense_q, W, x, tolerance=SUMS)


def test_nested_shard_maps():
    outer = mesh(2, 4)

    def f(w, x):
        def inner(w, x):
            return lax.psum(x @ w, "t")

        return jax.shard_map(
            inner, in_specs=(P("t"), P(None, "t")), out_specs=P(), axis_names={"t"}
        )(w, x)

    sharded = jax.shard_map(
        f, mesh=outer, in_specs=(P(), P("d")), out_specs=P("d"), axis_names={"d"}
    )
    q = quantize_aware(sharded, "w8a8")
    assert_same(jax.jit(q)(W, X), jax.jit(dense_q)(W, X), SUMS)
    # Forward mode: JAX cannot transpose nested shard_maps with anything nonlinear inside.
    tangent = lambda f: jax.jit(lambda w, x: jax.jvp(f, (w, x), (w, x)))(W, X)  # noqa: E731
    assert_same(tangent(q), tangent(dense_q), SUMS)


def test_called_inside_a_shard_map():
    q = quantize_aware(lambda w, x: jnp.tanh(x @ w), "w8a8")
    f = shard_map(q, (P(), P("d")), P("d"))
    twin = lambda w, x: jnp.tanh(dense_q(w, x))  # noqa: E731
    assert_twins(f, twin, W, X, tolerance=SUMS)


def test_gradient_inside_a_shard_map():
    """The step of a data-parallel loop: grad inside, mean over the devices."""

    def step(w, x):
        loss = lambda w: jnp.sum((x @ w) ** 2)  # noqa: E731
        return lax.psum(jax.grad(loss)(w), "d")

    f = shard_map(step, (P(), P("d")), P(), check_vma=False)
    twin = jax.grad(lambda w, x: jnp.sum(dense_q(w, x) ** 2))
    assert_same(jax.jit(quantize_aware(f, "w8a8"))(W, X), jax.jit(twin)(W, X), SUMS)


def test_two_shard_maps_share_a_block():
    """One jitted block, called on shards and on whole arrays: each has its own scale."""
    block = jax.jit(lambda w, x: x @ w)
    f1 = shard_map(lambda w, x: lax.psum(block(w, x), "d"), (P("d"), P(None, "d")), P())
    f = lambda p, x: f1(p["a"], x) + block(p["b"], x)  # noqa: E731
    p = {"a": W, "b": W * 2}
    twin = lambda p, x: dense_q(p["a"], x) + dense_q(p["b"], x)  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), twin, p, X, tolerance=SUMS)


# ---------------------------------------------------------------------- jit on a mesh


def test_auto_sharding():
    m = mesh(4, 2)
    put = lambda v, *spec: jax.device_put(v, NamedSharding(m, P(*spec)))  # noqa: E731
    p = {"up": put(MLP["up"], None, "t"), "down": put(MLP["down"], "t", None)}
    x = put(X, "d", None)
    f = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]  # noqa: E731
    assert_twins(quantize_aware(f, "w8a8"), mlp_q, p, x, tolerance=SUMS)


def test_sharding_constraints_inside_are_kept():
    m = mesh(4, 2)

    def f(p, x):
        h = lax.with_sharding_constraint(jnp.tanh(x @ p["up"]), NamedSharding(m, P("d", "t")))
        return h @ p["down"]

    sharding = NamedSharding(m, P("d"))
    q = jax.jit(quantize_aware(jax.jit(f, out_shardings=sharding), "w8a8"))
    out = q(MLP, X)
    assert out.sharding.is_equivalent_to(sharding, 2)
    assert_same(out, jax.jit(mlp_q)(MLP, X), SUMS)


def test_explicit_sharding():
    m = mesh(4, 2, kind=AxisType.Explicit)
    with jax.set_mesh(m):
        p = {
            "up": jax.device_put(MLP["up"], NamedSharding(m, P(None, "t"))),
            "down": jax.device_put(MLP["down"], NamedSharding(m, P("t", None))),
        }
        x = jax.device_put(X, NamedSharding(m, P("d", None)))

        def model(qx, qw):
            def f(p, x):
                h = jnp.tanh(qx(x) @ qw(p["up"]))
                return jnp.einsum("bh,hd->bd", qx(h), qw(p["down"]), out_sharding=P("d", None))

            return f

        f, twin = model(lambda x: x, lambda w: w), model(token, weight)
        q = quantize_aware(f, "w8a8")
        assert_same(jax.jit(q)(p, x), jax.jit(twin)(p, x), SUMS)
        loss = lambda f: lambda p: jnp.sum(f(p, x) ** 2)  # noqa: E731
        assert_same(jax.jit(jax.grad(loss(q)))(p), jax.jit(jax.grad(loss(twin)))(p), SUMS)
        assert jax.jit(q)(p, x).sharding.spec == P("d", None)
        assert jax.typeof(jax.jit(q)(p, x)) == jax.typeof(jax.jit(f)(p, x))
