# SPDX-License-Identifier: Apache-2.0
"""Pairs and groups of models of Flax and Equinox, inside shard_map, and what is refused."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from nets import Draw, rmsnorm

import jaxcompress as jc
from jaxcompress._core.channels import scale_pairs

D, H, F, V, T = 12, 3, 20, 11, 5


def noisy(params):
    d = Draw(50)
    return jax.tree.map(lambda a: a + d(*a.shape, scale=0.2), params)


def linen():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=H)(nn.LayerNorm()(x))
            h = nn.relu(nn.Dense(F)(nn.LayerNorm()(x)))
            return x + nn.Dense(D)(nn.Dropout(0.1, deterministic=True)(h))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.remat(Block)()(nn.Embed(V, D)(ids))
            return nn.Dense(5)(nn.RMSNorm()(x).mean(1))

    net, ids = Net(), jnp.arange(2 * T).reshape(2, T) % V
    params = noisy(jax.jit(net.init)(jax.random.key(0), ids))
    block = "params/CheckpointBlock_0/"
    attention = block + "MultiHeadDotProductAttention_0/"
    return net.apply, params, (ids,), {
        attention + "query/kernel": block + "LayerNorm_0/scale",
        attention + "out/kernel": attention + "value/kernel",
        block + "Dense_0/kernel": block + "LayerNorm_1/bias",
        block + "Dense_1/kernel": block + "Dense_0/bias",
        "params/Dense_0/kernel": "params/RMSNorm_0/scale",
    }  # fmt: skip


def nnx_model():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.norm2 = nnx.RMSNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
            self.att = nnx.MultiHeadAttention(H, D, decode=False, rngs=rngs)
            self.up, self.gate = nnx.Linear(D, F, rngs=rngs), nnx.Linear(D, F, rngs=rngs)
            self.down = nnx.Linear(F, D, rngs=rngs)

        def __call__(self, x):
            x = x + self.att(self.norm(x))
            h = self.norm2(x)
            return x + self.down(self.up(h) * nnx.gelu(self.gate(h)))

    model = Block(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    x = Draw(51)(2, T, D, scale=1.0)
    return fn, noisy(params), (x,), {
        "att/key/kernel/value": "norm/scale/value",
        "att/out/kernel/value": "att/value/kernel/value",
        "up/kernel/value": "norm2/bias/value",
        "gate/kernel/value": "norm2/bias/value",
        "down/kernel/value": "up/kernel/value",
    }  # fmt: skip


def equinox_model():
    class Net(eqx.Module):
        norm: eqx.nn.LayerNorm
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            a, b = jax.random.split(key)
            self.norm = eqx.nn.LayerNorm(D)
            self.up, self.down = eqx.nn.Linear(D, F, key=a), eqx.nn.Linear(F, 7, key=b)

        def __call__(self, x):
            return self.down(jax.nn.relu(self.up(self.norm(x))))

    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = Draw(52)(3, D, scale=1.0)
    return fn, noisy(params), (x,), {"up/weight": "norm/bias", "down/weight": "up/weight"}


@pytest.mark.parametrize("make", [linen, nnx_model, equinox_model], ids=lambda f: f.__name__)
def test_models_of_libraries(make):
    fn, params, inputs, want = make()
    found = scale_pairs(fn)(params, *inputs)
    plain = {site.removesuffix("/value"): site for site in found.sites}
    for site, producer in want.items():
        (pair,) = found.of(plain[site.removesuffix("/value")])
        have = {m.path.removesuffix("/value") for m in pair.producers}
        assert producer.removesuffix("/value") in have
    scales = {
        p: jnp.asarray(np.random.default_rng(k).uniform(0.5, 2, p.shape), jnp.float32)
        for k, p in enumerate(found.pairs)
    }
    run = jax.jit(fn)
    before, new = run(params, *inputs), found.apply(params, scales)  # all pairs at once
    np.testing.assert_allclose(run(new, *inputs), before, atol=1e-5 * np.abs(before).max())
    assert jax.tree.structure(new) == jax.tree.structure(params)
    groups = jc.prune.groups(fn)(params, *inputs)
    widths = {g.size for g in groups if g.pinned is None}
    assert F in widths


def test_scales_of_sharded_layers_are_shared_by_the_shards():
    d = Draw(53)
    params = {"g": d.near_one(8), "up": d(8, 12), "down": d(12, 8)}
    x = d(4, 8, scale=1.0)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("m",), (auto,), devices=jax.devices()[:2])

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(None, "m"), P("m", None), P()),
        out_specs=P(),
    )
    def layer(g, up, down, x):
        return jax.lax.psum(jax.nn.relu(rmsnorm(x, g) @ up) @ down, "m")

    def fn(p, x):
        return layer(p["g"], p["up"], p["down"], x)

    found = scale_pairs(fn)(params, x)
    assert [(p.name, p.shape) for p in found.pairs] == [("g | up", (8,)), ("up | down", (6,))]
    before = fn(params, x)
    s = {p: jnp.linspace(0.5, 2.0, p.channels) for p in found.pairs}
    after = fn(found.apply(params, s), x)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    group = jc.prune.groups(fn)(params, x)["up:1[0::1]"]
    assert (group.size, group.pinned) == (6, None)


def test_pool_reduces_what_shares_a_scale():
    from nets import llama

    fn, params, inputs = llama(True)
    (pair,) = scale_pairs(fn)(params, *inputs).of("layers/wo")
    (use,) = pair.uses
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    by_head = x.reshape(3, 2, 2, 4)  # layer, key head, query, width
    for name, reduce in (("max", np.max), ("min", np.min), ("sum", np.sum), ("mean", np.mean)):
        np.testing.assert_allclose(use.pool(x, name), reduce(by_head, 2).reshape(3, 8), rtol=1e-6)
    s = np.abs(x[:, :8])
    spread = np.broadcast_to(s.reshape(3, 2, 1, 4), (3, 2, 2, 4)).reshape(3, 16)
    np.testing.assert_array_equal(use.spread(s), spread)
    largest = {m.path: v for m, v in pair.absmax(params).items()}
    wv, wo = (np.abs(params["layers"][k]) for k in ("wv", "wo"))
    np.testing.assert_array_equal(largest["layers/wv"], wv.max(1))
    rows = wo.reshape(3, 2, 2, 4, 12).max((2, 4)).reshape(3, 8)
    np.testing.assert_array_equal(largest["layers/wo"], rows)
    with pytest.raises(jc.SiteError, match=r"reduce='median': expected one of \['max', 'mean'"):
        use.pool(x, "median")


def test_refusals():
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 3))}
    found = scale_pairs(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"])(params, jnp.ones((2, 4)))
    (pair,) = found.pairs
    with pytest.raises(jc.SiteError, match=r"`upp` is no site .* Nearest: `up`"):
        found.of("upp")
    with pytest.raises(jc.SiteError, match=r"scales of `up \| down` have shape \[3\]; expected"):
        pair.apply(params, jnp.ones(3))
    with pytest.raises(jc.SiteError, match="must be positive and finite; the smallest is 0.0"):
        pair.apply(params, jnp.zeros(8))
    with pytest.raises(jc.SiteError, match=r"not the parameters of the analysis: expected 2"):
        pair.apply({"up": params["up"]}, jnp.ones(8))
    packed = params | {"up": jc.Quantizer("int8").quantize(params["up"], axis=(0,))}
    with pytest.raises(jc.SiteError, match="`up` is a QTensor, which cannot be scaled exactly"):
        pair.apply(packed, jnp.ones(8))
    new = jax.jit(pair.apply)(params, jnp.full(8, 2.0))
    np.testing.assert_array_equal(new["down"], 2 * params["down"])
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert pair.apply(half, jnp.full(8, 2.0))["up"].dtype == jnp.bfloat16


def test_an_unknown_primitive_stops_scales():
    params = {"w": jnp.ones((4, 8)), "o": jnp.ones((8, 3))}
    fn = lambda p, x: jnp.fft.fft(x @ p["w"]).real @ p["o"]  # noqa: E731
    found = scale_pairs(fn)(params, jnp.ones((2, 4)))
    assert found.pairs == ()
    assert found.blocked["o"] == "no scale passes primitive fft"
