# SPDX-License-Identifier: Apache-2.0
"""Scale pairs: the function stays the same, and the sites' inputs are what the pair says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import NETS

import jaxcompress as jc
from jaxcompress._core.channels import scale_pairs

# By site: the parameters divided and multiplied, or what the reason must say. Worked out by hand.
EXPECTED = {
    "mlp": {
        "up": "an input",
        "mid": ("bias up", "mid"),
        "down": "tanh",
    },
    "gpt": {
        **{
            f"layers/{k}/{site}": (" ".join(f"layers/{k}/{m}" for m in by), f"layers/{k}/{site}")
            for k in (0,)
            for site, by in (("wqkv", ("b1", "g1")), ("up", ("b2", "g2")), ("wo", ("bqkv", "wqkv")))
        },
        "layers/0/down": "tanh",
        "emb#1": "reduce_sum",  # a tied head: the table is also the residual stream
    },
    "llama": {
        "layers/0/wq": ("layers/0/g1", "layers/0/wk layers/0/wq layers/0/wv"),
        "layers/0/wv": ("layers/0/g1", "layers/0/wk layers/0/wq layers/0/wv"),
        "layers/0/wo": ("layers/0/wv", "layers/0/wo"),
        "layers/0/wi": ("layers/0/g2", "layers/0/wi"),
        "layers/0/down": ("layers/0/wi", "layers/0/down"),
        "head": ("gf", "head"),
    },
    "llama_stacked": {
        "layers/wk": ("layers/g1", "layers/wk layers/wq layers/wv"),
        "layers/wo": ("layers/wv", "layers/wo"),
        "layers/wi": ("layers/g2", "layers/wi"),
        "layers/down": ("layers/wi", "layers/down"),
        "head": ("gf", "head"),
    },
    "mobile": {
        "c1": "an input",
        "dw": ("n1/bias n1/scale", "dw"),
        "pw": ("n2/bias n2/scale", "pw"),
        "r": ("n3/bias n3/scale n4/bias n4/scale", "gc r"),
        "gc": ("n3/bias n3/scale n4/bias n4/scale", "gc r"),
        "head": ("gc", "head"),
    },
    "squeeze_excite": {
        "s": ("a", "o s"),
        "e": ("s", "e"),
        "o": ("a", "o s"),
    },
    "relu_rnn": {"h": ("h w", "h o"), "o": ("h w", "h o")},
    "lstm": {"w": "an input", "h": "logistic", "o": "logistic"},
    "gru": {"h": "tanh", "o": "tanh"},
    "experts": {"router": "an input", "up": "an input", "down": ("up", "down")},
    "dense_experts": {"up": "an input", "down": ("bias up", "down")},
    "vit": {
        "patch": "an input",
        "qkv": ("g1", "qkv"),
        "wo": ("qkv", "wo"),
        "up": ("g2", "up"),
        "down": ("up", "down"),
        "head": ("gf", "head"),
    },
    "weight_norm": {"o": ("g", "o")},
    "low_rank": {"left+right+w": ("a", "left w")},
    "branches": {"h": ("h w", "h o"), "o": ("h w", "h o")},
}  # fmt: skip
SHAPES = {  # of the scales of one site: per layer, or shared by queries
    "llama": {"layers/0/wo": (8,), "layers/0/down": (20,)},
    "llama_stacked": {"layers/wo": (3, 8), "layers/wq": (3, 12), "head": (12,)},
    "dense_experts": {"down": (24,)},
    "experts": {"down": (8,)},
    "vit": {"wo": (12,)},
}  # fmt: skip


def paths(members):
    return " ".join(sorted({m.path for m in members}))


def error(a, b):
    return float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) + 1e-9))


def channels_last(site, operand, x, lead):
    """The input of a site as [..., channels], in the order of a pair's index; `lead` stays."""
    if site.op == "conv_general_dilated":
        return np.moveaxis(x, lead + site.params["dimension_numbers"].lhs_spec[1], -1), 0
    batch = ()
    if site.op == "dot_general":
        batch = site.params["dimension_numbers"][1][operand]
    axes = site.contracting(operand)
    rest = [d for d in range(x.ndim - lead) if d not in (*batch, *axes)]
    order = [*range(lead), *(lead + d for d in (*batch, *rest, *axes))]
    moved = np.transpose(x, order)
    return moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1), len(batch)


@pytest.mark.parametrize("name", NETS)
def test_every_pair_leaves_the_function_and_divides_the_inputs(name):
    fn, params, inputs = NETS[name]()
    found = scale_pairs(fn)(params, *inputs)
    sites = {s.name: s for s in jc.sites(fn)(params, *inputs)}
    run = jax.jit(jc.tap(fn, "*"))
    before, seen = run(params, *inputs)
    for k, pair in enumerate(found.pairs):
        s = jnp.asarray(np.random.default_rng(k).uniform(0.5, 2.0, pair.shape), jnp.float32)
        after, new = run(pair.apply(params, s), *inputs)
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
        used = {use.site: use for use in pair.uses}
        assert used, pair
        for site, x in ((site, seen[site]) for site in found.sites):
            if site not in used:
                assert error(np.asarray(new[site]), np.asarray(x)) < 1e-5, (pair, site)
                continue
            use, lead = used[site], x.ndim - sites[site].eqn.invars[used[site].operand].aval.ndim
            x, batch = channels_last(sites[site], use.operand, np.asarray(x), lead)
            y, _ = channels_last(sites[site], use.operand, np.asarray(new[site]), lead)
            factor = np.asarray(use.spread(s))
            stack = factor.ndim - 1 - batch  # the other dimensions of x follow the batch
            shape = (*factor.shape[:stack], *(1,) * (lead - stack), *factor.shape[stack:-1])
            factor = factor.reshape(*shape, *(1,) * (x.ndim - len(shape) - 1), factor.shape[-1])
            assert error(y * factor, x) < 1e-5, (pair, site)
            assert error(y, x) > 1e-2, (pair, site)


@pytest.mark.parametrize("name", EXPECTED)
def test_producers_and_consumers(name):
    fn, params, inputs = NETS[name]()
    found = scale_pairs(fn)(params, *inputs)
    for site, want in EXPECTED[name].items():
        if isinstance(want, str):
            assert found.of(site) == ()
            assert want in found.blocked[site]
        else:
            (pair,) = found.of(site)
            assert (paths(pair.producers), paths(pair.consumers)) == want
            assert site not in found.blocked
            if site in SHAPES.get(name, {}):
                assert pair.shape == SHAPES[name][site]


def test_a_concatenation_has_one_pair_for_each_branch():
    fn, params, inputs = NETS["unet"]()
    found = scale_pairs(fn)(params, *inputs)
    skip, up = found.of("c")
    assert [paths(p.producers) for p in (skip, up)] == ["a", "u"]
    assert [paths(p.consumers) for p in (skip, up)] == ["b c", "c"]
    index = {p: next(u for u in p.uses if u.site == "c").index for p in (skip, up)}
    np.testing.assert_array_equal(index[skip], [0, 1, 2, 3, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(index[up], [-1, -1, -1, -1, 0, 1, 2, 3, 4])


def test_the_same_pairs_are_found_again():
    """Whatever memory the terms of an analysis before have left."""
    fn, params, inputs = NETS["mobile"]()
    runs = set()
    for k in range(6):
        kept = [object() for _ in range(997 * k)]
        found = scale_pairs(fn)(params, *inputs)
        runs.add(str(found))
        del kept
    assert len(runs) == 1


def test_a_divisor_is_multiplied():
    rng = np.random.default_rng(0)
    params = {"g": rng.uniform(0.5, 2, (1, 8)), "b": rng.normal(size=(8, 4))}
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}
    x, s = rng.normal(size=(5, 8)).astype(np.float32), rng.uniform(0.5, 2, 8).astype(np.float32)
    fn = lambda p, x: jax.nn.relu(x / p["g"]) @ p["b"]  # noqa: E731
    (pair,) = scale_pairs(fn)(params, x).pairs
    assert not pair.producers  # none is divided
    assert [(m.path, m.exponent) for m in pair.consumers] == [("b", 1), ("g", 1)]
    np.testing.assert_allclose(fn(pair.apply(params, s), x), fn(params, x), rtol=1e-5, atol=1e-6)


ACTIVATIONS = {  # the power of s by which the producers are multiplied, or what stops it
    "relu": (jax.nn.relu, -1),
    "identity": (lambda x: x, -1),
    "leaky_relu": (jax.nn.leaky_relu, -1),
    "where": (lambda x: jnp.where(x > 0, x, 0.1 * x), -1),
    "abs": (jnp.abs, -1),
    "squared_relu": (lambda x: jax.nn.relu(x) ** 2, -0.5),
    "relu6": (jax.nn.relu6, "`min`"),
    "shifted": (lambda x: jax.nn.relu(x + 1), "`add`"),
    "elu": (jax.nn.elu, "`expm1`"),
    "softplus": (jax.nn.softplus, "`"),
    "step": (lambda x: (x > 0).astype(jnp.float32) * x.round(), "`round`"),
    "norm": (lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), "`reduce_sum`"),
    "constants": (lambda x: x + jnp.arange(8.0), "`add`"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_passes_a_scale_and_what_does_not(name):
    act, want = ACTIVATIONS[name]
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in (("up", (4, 8)), ("bias", (8,)), ("down", (8, 3)))
    }
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def fn(p, x):
        return act(x @ p["up"] + p["bias"]) @ p["down"]

    found = scale_pairs(fn)(params, x)
    if isinstance(want, str):
        assert found.pairs == ()
        assert want in found.blocked["down"]
        return
    (pair,) = found.pairs
    assert {m.path: m.exponent for m in pair.producers} == {"up": want, "bias": want}
    s = jnp.asarray(rng.uniform(0.5, 2, 8), jnp.float32)
    before = fn(params, x)
    after = fn(pair.apply(params, s), x)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
