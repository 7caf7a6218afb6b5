# SPDX-License-Identifier: Apache-2.0
"""The smaller function equals the original with what was removed set to zero, or cut by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from nets import NETS, Draw, attend, layernorm, rmsnorm
from test_groups import leaves_by_path
from test_models import equinox_model, linen, nnx_model
from twins import default

import jaxcompress as jc

TOLERANCE = 2e-5  # relative, of float32 sums in another order


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / (np.abs(y).max() + 1e-9)) for x, y in pairs)


def row_of(small, name):
    return next(r for r in small.report.rows if name in r.members)


def zeroed(params, groups, small, spare=()):
    """The parameters with every slice of the removed indices zero, but for the paths in `spare`."""
    flat, tree = leaves_by_path(params)
    for group in groups:
        kept = row_of(small, str(group.members[0])).indices
        if kept is None:
            continue
        for m in group.members:
            if m.path in spare:
                continue
            places, w = m.positions(group.size), flat[m.path].copy()
            if kept.ndim == 1:
                gone = np.setdiff1d(np.arange(group.size), kept)
                np.moveaxis(w, m.axis, 0)[places[gone].ravel()] = 0
            else:
                for layer, own in zip(w, kept, strict=True):
                    gone = np.setdiff1d(np.arange(group.size), own)
                    np.moveaxis(layer, m.axis - 1, 0)[places[gone].ravel()] = 0
            flat[m.path] = w
    return jax.tree.unflatten(tree, list(flat.values()))


# Sources that read their sizes off the parameters: cut parameters are their own small function.
POLYMORPHIC = {
    "mlp": ["up:1", "down:0"],
    "gpt": ["emb:1", "layers/0/up:1"],
    "llama": ["emb:1"],
    "llama_stacked": ["emb:1", "layers/g1:0"],
    "squeeze_excite": ["a:3", "s:1"],
    "weight_norm": ["v:1"],
    "low_rank": ["a:1", "left:1"],
    "dense_experts": ["up:0", "up:2"],
}


@pytest.mark.parametrize("name", default(POLYMORPHIC, *[*POLYMORPHIC][::2]))
def test_the_same_source_with_cut_parameters(name):
    fn, params, inputs = NETS[name]()
    for member in POLYMORPHIC[name]:
        small = jc.prune.shrink(fn, params, *inputs, keep={member: 0.67})
        want = fn(small.params, *inputs)
        assert distance(small.fn(small.params, *inputs), want) < TOLERANCE, member


@pytest.mark.parametrize(("name", "member"), [("mlp", "down:0"), ("llama_stacked", "emb:1")])
def test_a_gradient_is_that_of_the_cut_source(name, member):
    fn, params, inputs = NETS[name]()
    small = jc.prune.shrink(fn, params, *inputs, keep={member: 0.5})

    def grad(f):
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(f(p, *inputs)))))(small.params)

    assert distance(grad(small.fn), grad(fn)) < 1e-4


def test_every_layer_keeps_its_own_units_and_layers_leave():
    fn, params, inputs = NETS["llama_stacked"]()
    small = jc.prune.shrink(fn, params, *inputs, keep={"layers/down:1": 0.5})
    kept = row_of(small, "layers/down:1").indices
    assert kept.shape == (3, 10)
    assert (kept[0] != kept[1]).any()
    small = jc.prune.shrink(fn, params, *inputs, keep={"layers/g1:0": [0, 2]})
    assert small.params["layers"]["wi"].shape[0] == 2
    wq = np.asarray(params["layers"]["wq"])
    np.testing.assert_array_equal(small.params["layers"]["wq"], wq[[0, 2]])


def test_the_users_derivative_stays():
    """A custom_vjp that is no derivative, and a custom_jvp."""
    d = Draw(60)
    params, x = {"w": d(4, 8), "o": d(8, 5)}, d(3, 4, scale=1.0)

    @jax.custom_vjp
    def act(x):
        return jnp.maximum(x, 0)

    act.defvjp(lambda x: (jnp.maximum(x, 0), x > 0), lambda mask, g: (3 * g * mask,))

    @jax.custom_jvp
    def bend(x):
        return jnp.abs(x)

    bend.defjvp(lambda p, t: (bend(*p), 5 * t[0]))
    for f in (act, bend):
        fn = lambda p, x, f=f: f(x @ p["w"]) @ p["o"]  # noqa: E731
        small = jc.prune.shrink(fn, params, x, keep={"w:1": 5})
        grads = [jax.grad(lambda p, f=f: f(p, x).sum())(small.params) for f in (small.fn, fn)]
        assert distance(*grads) < TOLERANCE
        plain = jax.grad(lambda p: (jnp.maximum(x @ p["w"], 0) @ p["o"]).sum())(small.params)
        assert distance(grads[0]["w"], plain["w"]) > 0.5


def test_branches_are_differentiated():
    d = Draw(61)
    params, x = {"w": d(4, 8), "o": d(8, 5)}, d(3, 4, scale=1.0)

    def fn(p, x):
        y = x @ p["w"]
        y = jax.lax.cond(x[0, 0] > 0, lambda y: 2 * y, lambda y: jnp.maximum(y, 0.5 * y), y)
        y = jax.lax.switch(1, [jnp.sin, jnp.tanh], y)
        return jax.checkpoint(lambda y: jax.jit(jnp.square)(y))(y) @ p["o"]

    small = jc.prune.shrink(fn, params, x, keep={"w:1": 3})
    for sign in (1, -1):
        loss = lambda f, s=sign: jax.value_and_grad(lambda p: f(p, s * x).sum())  # noqa: E731
        assert distance(loss(small.fn)(small.params), loss(fn)(small.params)) < TOLERANCE


def test_constants_iota_padding_and_slices_are_cut():
    d = Draw(62)
    table = d(8)
    params, x = {"w": d(4, 8), "o": d(11, 5)}, d(3, 4, scale=1.0)

    def fn(p, x):
        y = (x @ p["w"] + table) * jnp.arange(8.0)
        y = jnp.concatenate([jnp.flip(y[:1], 0), y[1:]], 0)
        return jnp.pad(y, ((0, 0), (1, 2))) @ p["o"]

    kept = [0, 3, 4, 7]
    small = jc.prune.shrink(fn, params, x, keep={"w:1": kept})
    want = (x @ params["w"][:, kept] + table[np.array(kept)]) * np.array(kept, "float32")
    want = want @ params["o"][1:9][np.array(kept)]
    assert distance(small.fn(small.params, x), want) < TOLERANCE
    assert small.params["o"].shape == (7, 5)


def test_interleaved_pairs_leave_together():
    d = Draw(63)
    params, x = {"w": d(4, 8), "o": d(8, 5)}, d(3, 4, scale=1.0)

    def fn(p, x):
        y = x @ p["w"]
        a, b = y[..., ::2], y[..., 1::2]
        return jnp.stack([2 * a - b, 2 * b + a], -1).reshape(y.shape) @ p["o"]

    groups = jc.prune.groups(fn)(params, x)
    (pairs,) = [g for g in groups if g.size == 4 and not g.pinned]
    small = jc.prune.shrink(fn, params, x, keep={str(pairs.members[0]): 2})
    assert small.params["w"].shape == (4, 4)
    want = fn(zeroed(params, groups, small), x)
    assert distance(small.fn(small.params, x), want) < TOLERANCE


def test_means_of_norms_shrink_and_pooled_means_do_not():
    d = Draw(64)
    params, x = {"w": d(4, 12), "g": d(12), "o": d(12, 5), "q": d(1, 5)}, d(3, 4, scale=1.0)
    kept = np.array([1, 2, 5, 7, 8, 11])

    def norm(p, x):
        y = x @ p["w"]
        y = y / jnp.sqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-3)
        return layernorm(y, p["g"]) @ p["o"]

    def unbiased(p, x):
        y = x @ p["w"]
        return y / jnp.std(y, -1, ddof=1, keepdims=True) @ p["o"]

    for fn in (norm, unbiased):
        small = jc.prune.shrink(fn, params, x, keep={"w:1": kept})
        assert distance(small.fn(small.params, x), fn(small.params, x)) < TOLERANCE

    def pooled(p, x):
        return jnp.mean(jax.nn.relu(x @ p["w"]), -1, keepdims=True) @ p["q"]

    small = jc.prune.shrink(pooled, params, x, keep={"w:1": kept})
    want = jnp.sum(jax.nn.relu(x @ params["w"][:, kept]), -1, keepdims=True) / 12 @ params["q"]
    assert distance(small.fn(small.params, x), want) < TOLERANCE


def routed(top, d):
    """Experts chosen by argmax, or the best two; products of rows of one expert each."""
    params = {"router": d(4, 5), "up": d(5, 4, 8), "down": d(5, 8, 4)}
    params["router"] = params["router"].at[:, 3].set(0)  # never chosen: see `bias`
    bias = jnp.where(jnp.arange(5) == 3, -1e9, 0.0)

    def fn(p, x):
        scores = x @ p["router"] + bias
        gates, expert = jax.lax.top_k(jax.nn.softmax(scores), top)
        if top == 1:
            expert = jnp.argmax(scores, -1)[:, None]
        flat = expert.ravel()
        order = jnp.argsort(flat)
        rows = jnp.repeat(x, top, 0)[order]
        counts = jnp.bincount(flat, length=5)
        h = jax.nn.relu(jax.lax.ragged_dot(rows, p["up"], counts))
        y = jnp.zeros_like(rows).at[order].set(jax.lax.ragged_dot(h, p["down"], counts))
        return jnp.sum(y.reshape(len(x), top, -1) * gates[..., None], 1)

    return fn, params


@pytest.mark.parametrize("top", [1, 2])
def test_an_expert_that_nobody_chooses_leaves(top):
    d = Draw(65)
    (fn, params), x = routed(top, d), d(9, 4, scale=1.0)
    small = jc.prune.shrink(fn, params, x, keep={"up:0": [0, 1, 2, 4]})
    assert {k: w.shape for k, w in small.params.items()} == {
        "router": (4, 4), "up": (4, 4, 8), "down": (4, 8, 4)
    }  # fmt: skip
    assert distance(small.fn(small.params, x), fn(params, x)) < TOLERANCE
    other = jc.prune.shrink(fn, params, x, keep={"up:0": [0, 1, 2]})  # others take their tokens
    assert bool(jnp.isfinite(other.fn(other.params, x)).all())
    if top == 2:
        single = jc.prune.shrink(fn, params, x, keep={"up:0": [1]})
        with pytest.raises(jc.SiteError, match="takes 2 of an axis of which 1 of 5 are kept"):
            single.fn(single.params, x)


def test_a_codebook_looked_up_by_its_nearest_entry():
    d = Draw(66)
    params, x = {"code": d(6, 4), "o": d(4, 3)}, d(9, 4, scale=1.0)

    def fn(p, x):
        nearest = jnp.argmin(jnp.sum((x[:, None] - p["code"]) ** 2, -1), -1)
        return p["code"][nearest] @ p["o"]

    small = jc.prune.shrink(fn, params, x, keep={"code:0": [1, 2, 5]})
    assert distance(small.fn(small.params, x), fn(small.params, x)) < TOLERANCE


def test_a_choice_keeps_its_numbers_and_is_removed_by_name():
    d = Draw(71)
    params, x = {"w": d(4, 6), "v": d(6, 5)}, d(20, 4, scale=1.0)
    fn = lambda p, x: jnp.argmax(jnp.tanh(x @ p["w"]) @ p["v"], -1)  # noqa: E731
    group = jc.prune.groups(fn)(params, x)["v:1"]
    assert (group.pinned, group.ordered) == (None, "argmax")
    small = jc.prune.shrink(fn, params, x, keep=0.5)
    assert small.params["v"].shape == (3, 5)
    small = jc.prune.shrink(fn, params, x, keep={"v:1": [1, 3, 4]})
    want = np.array([1, 3, 4])[np.argmax(np.tanh(x @ params["w"]) @ small.params["v"], -1)]
    np.testing.assert_array_equal(small.fn(small.params, x), want)


def test_an_index_from_elsewhere_still_pins():
    d = Draw(67)
    params, x = {"w": d(4, 6), "t": d(6, 3)}, d(9, 4, scale=1.0)
    shifted = lambda p, x: p["t"][(jnp.argmax(x @ p["w"], -1) + 1) % 6]  # noqa: E731
    assert jc.prune.groups(shifted)(params, x)["t:0"].pinned == "an index"
    plain = lambda p, x: p["t"][jnp.argmax(x @ p["w"], -1)]  # noqa: E731
    assert jc.prune.groups(plain)(params, x)["t:0"].pinned is None


def test_tied_embeddings_lose_width():
    fn, params, inputs = NETS["gpt"]()
    small = jc.prune.shrink(fn, params, *inputs, keep={"emb:1": 8})
    assert small.params["emb"].shape == (11, 8)
    assert small.params["layers"][0]["wqkv"].shape == (8, 36)


def test_dropout_of_the_small_width():
    d = Draw(68)
    params, x = {"w": d(4, 8), "o": d(8, 5)}, d(3, 4, scale=1.0)

    def fn(p, x, key):
        y = x @ p["w"]
        return jnp.where(jax.random.bernoulli(key, 0.5, y.shape), 2 * y, 0) @ p["o"]

    small = jc.prune.shrink(fn, params, x, jax.random.key(0), keep={"w:1": 5})
    assert small.fn(small.params, x, jax.random.key(1)).shape == (3, 5)


@pytest.mark.parametrize("make", [linen, nnx_model, equinox_model], ids=lambda f: f.__name__)
def test_models_of_libraries_shrink(make):
    fn, params, inputs, _ = make()
    groups = jc.prune.groups(fn)(params, *inputs)
    units = next(g for g in groups if g.size == 20 and not g.pinned)
    small = jc.prune.shrink(fn, params, *inputs, keep={units.name: 0.5})
    assert jax.tree.structure(small.params) == jax.tree.structure(params)
    flat, tree = leaves_by_path(params)
    want = fn(zeroed_tree(params, units, small), *inputs)
    assert distance(small.fn(small.params, *inputs), want) < TOLERANCE
    assert flat and tree


def zeroed_tree(params, group, small):
    """As `zeroed`, on any pytree: members are found by the end of their path."""
    kept = row_of(small, group.name).indices
    gone = np.setdiff1d(np.arange(group.size), kept)
    members = {}
    for m in group.members:
        members.setdefault(m.path, []).append(m)

    def cut(path, w):
        from jaxcompress._core.provenance import key_path

        w = np.array(w)
        for m in members.get(key_path(path), ()):
            np.moveaxis(w, m.axis, 0)[m.positions(group.size)[gone].ravel()] = 0
        return jnp.asarray(w)

    return jax.tree_util.tree_map_with_path(cut, params)


def test_inside_shard_map():
    d = Draw(69)
    params = {"g": d.near_one(8), "up": d(8, 12), "down": d(12, 8)}
    x = d(4, 8, scale=1.0)
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("m",), (auto,), devices=jax.devices()[:2])
    specs = (P(), P(None, "m"), P("m", None), P())

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def layer(g, up, down, x):
        return jax.lax.psum(jax.nn.relu(rmsnorm(x, g) @ up) @ down, "m")

    fn = lambda p, x: layer(p["g"], p["up"], p["down"], x)  # noqa: E731
    small = jc.prune.shrink(fn, params, x, keep={"up:1[0::1]": 4})
    assert small.params["up"].shape == (8, 8)  # four of the six units of both shards
    assert distance(small.fn(small.params, x), fn(small.params, x)) < TOLERANCE


def test_attention_without_a_head():
    """Heads of a fused projection used as [3, heads, width], [heads, 3, width] and flat."""
    d = Draw(70)
    x = d(2, 5, 12, scale=1.0)
    for order in ("chk", "hck"):
        params = {"qkv": d(12, 36), "o": d(12, 12)}

        def fn(p, x, order=order):
            sizes = {"c": 3, "h": 3, "k": 4}
            y = (x @ p["qkv"]).reshape(2, 5, *(sizes[a] for a in order))
            q, k, v = jnp.moveaxis(y, 2 + order.index("c"), 0)
            return attend(q, k, v) @ p["o"]

        groups = jc.prune.groups(fn)(params, x)
        small = jc.prune.shrink(fn, params, x, keep={"o:0[0::4]": [0, 2]})
        assert small.params["qkv"].shape == (12, 24)
        want = fn(zeroed(params, groups, small), x)
        assert distance(small.fn(small.params, x), want) < TOLERANCE
