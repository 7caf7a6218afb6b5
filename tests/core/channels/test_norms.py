# SPDX-License-Identifier: Apache-2.0
"""Folding batch norm: the function stays the same, the normalization is really gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import Draw, batchnorm, batchnorm_params, mobile

from jaxcompress._core.channels import fold_norm, scale_pairs


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_four_norms_of_a_convolutional_net():
    fn, p, (x,) = mobile()
    out = fold_norm(fn)(p, x)
    assert out.folded == {
        site: tuple(f"{norm}/{k}" for k in ("bias", "mean", "scale", "var"))
        for site, norm in (("c1", "n1"), ("dw", "n2"), ("pw", "n3"), ("r", "n4"))
    }
    assert out.kept == {
        "gc": "no multiplication by parameters follows it",
        "head": "no multiplication by parameters follows it",
    }
    close(out.fn(out.params, x), fn(p, x))
    close(out.fn(out.params, x[:1]), fn(p, x[:1]))  # another batch size
    for site, norm in (("c1", "n1"), ("dw", "n2"), ("pw", "n3"), ("r", "n4")):
        q = {k: np.asarray(v, np.float64) for k, v in p[norm].items()}
        a = q["scale"] / np.sqrt(q["var"] + 1e-3)  # by hand
        close(out.params[site], np.asarray(p[site]) * a)
        close(out.params[norm]["bias"], q["bias"] - q["mean"] * a)
    gone = {
        n: {k: v if k == "bias" else v * jnp.nan for k, v in q.items()}
        for n, q in out.params.items()
        if n in ("n1", "n2", "n3", "n4")
    }
    close(out.fn(out.params | gone, x), fn(p, x))  # of every norm only the bias is read
    after = scale_pairs(out.fn)(out.params, x)  # now convolutions are behind convolutions
    assert [m.path for m in after.of("dw")[0].producers] == ["c1", "n1/bias"]


def linear():
    d = Draw(20)
    p = {"w": d(4, 6), "b": d(6), "n": batchnorm_params(d, 6), "o": d(6, 3)}
    return p, (d(5, 4, scale=1.0),)


def divided(p, x):
    n, y = p["n"], x @ p["w"] + p["b"]
    return jax.nn.relu((y - n["mean"]) / jnp.sqrt(n["var"] + 1e-3) * n["scale"]) @ p["o"]


def transposed(p, x):
    return jax.nn.relu(batchnorm(p["n"], jnp.einsum("oi,bi->bo", p["w"].T, x))) @ p["o"]


@jax.jit
def jitted(p, x):
    return jax.checkpoint(lambda p, x: batchnorm(p["n"], x @ p["w"]))(p, x) @ p["o"]


@pytest.mark.parametrize("fn", [divided, transposed, jitted], ids=lambda fn: fn.__name__)
def test_norms_are_folded_however_they_are_written(fn):
    p, (x,) = linear()
    out = fold_norm(fn)(p, x)
    assert list(out.folded) == ["w"]
    close(out.fn(out.params, x), fn(p, x))
    read = 0
    for k in ("mean", "var", "scale", "bias"):
        poisoned = out.params | {"n": out.params["n"] | {k: out.params["n"][k] * jnp.nan}}
        read += bool(jnp.isnan(out.fn(poisoned, x)).any())
    assert read == 1


def test_statistics_in_another_argument():
    p, (x,) = linear()
    stats = {k: p["n"].pop(k) for k in ("mean", "var")}

    def fn(p, stats, x):
        return jax.nn.relu(batchnorm(p["n"] | stats, x @ p["w"])) @ p["o"]

    out = fold_norm(fn, argnums=(0, 1))(p, stats, x)
    close(out.fn(*out.params, x), fn(p, stats, x))
    swapped = fold_norm(fn, argnums=(1, 0))(p, stats, x)
    close(swapped.params[1]["w"], out.params[0]["w"])
    alone = fold_norm(fn)(p, stats, x)
    assert not alone.folded
    assert alone.kept["w"] == "no multiplication by parameters follows it"


def test_flax_batch_norm():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    d, net = Draw(21), Net()
    x = d(2, 4, 4, 3, scale=1.0)
    variables = net.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: jnp.abs(a + d(*a.shape, scale=0.3)), variables)
    out = fold_norm(net.apply)(variables, x)
    assert list(out.folded) == ["params/Conv_0/kernel"]
    close(out.fn(out.params, x), net.apply(variables, x))


REASONS = {
    "used elsewhere": lambda p, x: batchnorm(p["n"], x @ p["w"]) @ (p["o"] + p["w"][:, :3].sum()),
    "no multiplication": lambda p, x: (lambda y: batchnorm(p["n"], y) + y)(x @ p["w"]) @ p["o"],
    "inside a loop": lambda p, x: jax.lax.map(lambda r: batchnorm(p["n"], r @ p["w"]), x) @ p["o"],
    "differs along positions": lambda p, x: (
        x @ p["w"] * jnp.repeat(p["n"]["scale"][:5, None], 6, 1)
    ),
    "computed from parameters": lambda p, x: batchnorm(p["n"], x @ jnp.tanh(p["w"])) @ p["o"],
    "can take its shift": lambda p, x: (x @ p["w"] + p["b"] * 2) * p["n"]["scale"] @ p["o"],
}


@pytest.mark.parametrize("why", REASONS)
def test_what_is_not_folded_says_why_and_stays(why):
    p, (x,) = linear()
    fn = REASONS[why]
    out = fold_norm(fn)(p, x)
    names = [name for name in out.kept if "w" in name]
    assert names
    assert why in out.kept[names[0]]
    np.testing.assert_array_equal(out.params["w"], p["w"])
    close(out.fn(out.params, x), fn(p, x))
