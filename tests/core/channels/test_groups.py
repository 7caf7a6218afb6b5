# SPDX-License-Identifier: Apache-2.0
"""Coupled groups: permuting their indices changes nothing, and no smaller set can be permuted."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import NETS, Draw

import jaxcompress as jc


def leaves_by_path(params):
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in flat
    ]
    return dict(zip(names, (np.asarray(x) for _, x in flat))), tree


def permuted(params, group, orders):
    """Every member with its indices in another order; `orders` has one for each layer, or one."""
    flat, tree = leaves_by_path(params)
    for m in group.members:
        places = m.positions(group.size)
        parts = flat[m.path] if group.layers else flat[m.path][None]
        axis = m.axis - 1 if group.layers else m.axis
        out = []
        for part, order in zip(parts, orders, strict=True):
            index = np.arange(part.shape[axis])
            index[places] = places[order]
            out.append(part.take(index, axis))
        flat[m.path] = np.stack(out) if group.layers else out[0]
    return jax.tree.unflatten(tree, list(flat.values()))


def unchanged(a, b):
    return np.abs(a - b).max() < 1e-5 * np.abs(b).max()


FREE = {  # groups that can be removed: (size, members) of some, worked out by hand
    "mlp": [(8, "bias:0 mid:0 up:1"), (6, "down:0 mid:1")],
    "llama_stacked": [(20, "layers/down:1 layers/wi:2[0::1] layers/wi:2[20::1]")],
    "mobile": [(8, "c1:3 dw:3 n1/bias:0 n1/mean:0 n1/scale:0 n1/var:0 n2/bias:0 n2/mean:0 "
                   "n2/scale:0 n2/var:0 pw:2"),
               (3, "gc:3[0::2] head:0[0::2] n3/bias:0[0::4] n3/mean:0[0::4] n3/scale:0[0::4] "
                   "n3/var:0[0::4] n4/bias:0[0::4] n4/mean:0[0::4] n4/scale:0[0::4] "
                   "n4/var:0[0::4] pw:3[0::4] r:2[0::4] r:3[0::4]"),
               (2, "gc:3[0::1] head:0[0::1]")],
    "unet": [(4, "a:3 b:2 c:2[0::1]"), (5, "c:2[4::1] u:3"), (6, "b:3 u:2"), (7, "c:3 o:2")],
    "squeeze_excite": [(6, "a:3 e:1 o:2 s:0"), (2, "e:0 s:1")],
    "relu_rnn": [(8, "h:0 h:1 o:0 w:1")],
    "lstm": [(6, "b:0[0::1] b:0[12::1] b:0[18::1] b:0[6::1] h:0 h:1[0::1] h:1[12::1] h:1[18::1] "
                 "h:1[6::1] o:0 w:1[0::1] w:1[12::1] w:1[18::1] w:1[6::1]")],
    "gru": [(6, "h:0 h:1[0::1] h:1[12::1] h:1[6::1] o:0 w:1[0::1] w:1[12::1] w:1[6::1]")],
    "experts": [(8, "down:1 up:2")],
    "dense_experts": [(3, "bias:0 down:0 up:0"), (8, "bias:1 down:1 up:2")],
    "vit": [(12, "cls:0 down:1 g1:0 g2:0 gf:0 head:0 patch:3 pos:1 qkv:0 up:0 wo:2"),
            (3, "qkv:2 wo:0"), (4, "qkv:3 wo:1"), (20, "down:0 up:1")],
    "weight_norm": [(8, "g:0 o:0 v:1")],
    "low_rank": [(8, "a:1 left:0 w:0"), (2, "left:1 right:0")],
    "branches": [(8, "h:0 h:1 o:0 w:1")],
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_permuting_a_group_leaves_the_function(name):
    fn, params, inputs = NETS[name]()
    found = jc.prune.groups(fn)(params, *inputs)
    run = jax.jit(fn)
    before = np.asarray(run(params, *inputs))
    rng = np.random.default_rng(0)
    tried = 0
    for group in found:
        if group.pinned or group.ordered:
            continue
        orders = [np.roll(rng.permutation(group.size), 1) for _ in range(group.layers or 1)]
        orders = [o if (o != np.arange(group.size)).any() else o[::-1] for o in orders]
        new = permuted(params, group, orders)
        assert unchanged(np.asarray(run(new, *inputs)), before), group
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params)))
        if len(group.members) > 1:  # the last member alone stays: not the same function
            part = dataclasses.replace(group, members=group.members[:-1])
            assert not unchanged(np.asarray(run(permuted(params, part, orders), *inputs)), before)
        tried += 1
    assert tried
    have = {(g.size, " ".join(sorted(map(str, g.members)))) for g in found if not g.pinned}
    for size, members in FREE.get(name, []):
        assert (size, " ".join(sorted(members.split()))) in have


@pytest.mark.parametrize(
    "name", ["mlp", "relu_rnn", "dense_experts", "squeeze_excite", "weight_norm", "low_rank"]
)
def test_brute_force_finds_the_same_groups(name):
    """Swapping two indices along axes leaves the function iff the axes are those of groups."""
    fn, params, inputs = NETS[name]()
    flat, tree = leaves_by_path(params)
    run = jax.jit(lambda flat, inputs: fn(jax.tree.unflatten(tree, flat), *inputs))
    before = np.asarray(run(list(flat.values()), inputs))
    axes = [(p, a) for p, w in flat.items() for a in range(w.ndim) if w.shape[a] > 1]
    if name == "squeeze_excite":  # windows are not permuted
        axes = [(p, a) for p, a in axes if flat[p].ndim < 4 or a > 1]
    free = [
        {(m.path, m.axis) for m in g.members}
        for g in jc.prune.groups(fn)(params, *inputs)
        if not g.pinned
    ]
    found = set()
    sizes = {flat[p].shape[a] for p, a in axes}
    for size in sizes:
        same = [(p, a) for p, a in axes if flat[p].shape[a] == size]
        for count in range(1, len(same) + 1):
            for chosen in itertools.combinations(same, count):
                new = dict(flat)
                for p, a in chosen:
                    index = np.arange(size)
                    index[[0, 1]] = 1, 0
                    new[p] = new[p].take(index, a)
                if unchanged(np.asarray(run(list(new.values()), inputs)), before):
                    found.add(frozenset(chosen))
    smallest = {s for s in found if not any(t < s for t in found)}
    assert smallest == {frozenset(g) for g in free}


def test_layers_choose_their_own_indices_or_share_them():
    fn, params, inputs = NETS["llama_stacked"]()
    found = jc.prune.groups(fn)(params, *inputs)
    assert found["layers/down:1"].layers == 3
    assert found["layers/down:2"].layers is None
    assert found["layers/down:2"].mixed
    assert found["layers/down:0"].ordered == "the order of layers"
    rope = found["layers/wk:2[0::1]"]
    assert (rope.ordered, rope.layers) == ("iota", None)


PINS = {
    "primitive fft": lambda p, x: jnp.fft.fft(x @ p["w"]).real @ p["o"],
    "sort": lambda p, x: jnp.sort(x @ p["w"], -1) @ p["o"],
    "cumsum": lambda p, x: jnp.cumsum(x @ p["w"], -1) @ p["o"],
    "top_k": lambda p, x: jax.lax.top_k(x @ p["w"], 8)[0] @ p["o"],
    "rev": lambda p, x: jnp.flip(x @ p["w"], -1) @ p["o"],
    "an index": lambda p, x: (x @ p["w"])[:, jnp.array([1, 0, 2, 3, 4, 5, 6, 7])] @ p["o"],
    "dynamic_slice": lambda p, x: (
        jax.lax.dynamic_slice_in_dim(x @ p["w"], x.astype(int)[0, 0], 3, 1) @ p["o"][:3]
    ),
    "an output": lambda p, x: x @ p["w"],
    "primitive cholesky": lambda p, x: jnp.linalg.cholesky(p["w"].T @ p["w"] + jnp.eye(8)) @ p["o"],
}


@pytest.mark.parametrize("why", PINS)
def test_what_pins_is_named(why):
    d = Draw(30)
    params = {"w": d(4, 8), "o": d(8, 3)}
    group = jc.prune.groups(PINS[why])(params, d(5, 4, scale=1.0))["w:1"]
    assert group.pinned == why


def test_the_table_and_an_unknown_member():
    fn, params, inputs = NETS["mlp"]()
    found = jc.prune.groups(fn)(params, *inputs)
    text = str(found)
    assert "2 groups whose indices can be removed, 2 pinned" in text
    assert "pinned by an input" in text
    with pytest.raises(jc.SiteError, match=r"no group has a member `upp:1`\. Nearest: `up:1`"):
        found["upp:1"]
