# SPDX-License-Identifier: Apache-2.0
"""Small networks, as (function, parameters, inputs)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

D, H, K, F, V, T = 12, 3, 4, 20, 11, 5
G, KV = 2, 2  # queries per key head, key heads


class Draw:
    """Random arrays, the same whichever tests run."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, scale=None):
        scale = scale or 1 / np.sqrt(shape[-2] if len(shape) > 1 else 4)
        return jnp.asarray(scale * self.rng.normal(size=shape), jnp.float32)

    def near_one(self, *shape):
        return 1 + self(*shape, scale=0.2)


def layernorm(x, g, b=None):
    y = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * g
    return y if b is None else y + b


def rmsnorm(x, g):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * g


def batchnorm(q, x):
    return (x - q["mean"]) * lax.rsqrt(q["var"] + 1e-3) * q["scale"] + q["bias"]


def batchnorm_params(draw, n):
    var = draw.near_one(n) ** 2
    return {"mean": draw(n), "var": var, "scale": draw.near_one(n), "bias": draw(n)}


def heads(x, h):
    return x.reshape(*x.shape[:2], h, -1)


def attend(q, k, v, mask=None):
    s = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    s = s if mask is None else jnp.where(mask, s, -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v).reshape(*q.shape[:2], -1)


def rope(x):
    d = x.shape[-1]
    t = jnp.arange(x.shape[1])[:, None] * 100.0 ** (-jnp.arange(0, d, 2) / d)
    a, b = jnp.split(x, 2, -1)
    c, s = jnp.cos(t)[:, None], jnp.sin(t)[:, None]
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def conv(x, w, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def mlp():
    d = Draw()
    p = {"up": d(4, 8), "bias": d(8), "mid": d(8, 6), "down": d(6, 5)}

    def fn(p, x):
        h = jax.nn.relu(x @ p["up"] + p["bias"])
        return jax.nn.gelu(h @ p["mid"]) @ p["down"]

    return fn, p, (d(3, 4, scale=1.0),)


def gpt(layers=1, d=D):
    draw = Draw(1)

    def layer():
        return {
            "g1": draw.near_one(d),
            "b1": draw(d),
            "wqkv": draw(d, 3 * d),
            "bqkv": draw(3 * d),
            "wo": draw(d, d),
            "bo": draw(d),
            "g2": draw.near_one(d),
            "b2": draw(d),
            "up": draw(d, F),
            "bu": draw(F),
            "down": draw(F, d),
        }

    p = {"emb": draw(V, d, scale=1.0), "pos": draw(T, d), "gf": draw.near_one(d)}
    p["layers"] = [layer() for _ in range(layers)]

    def fn(p, ids):
        x = p["emb"][ids] + p["pos"]
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        for q in p["layers"]:
            a = jnp.split(layernorm(x, q["g1"], q["b1"]) @ q["wqkv"] + q["bqkv"], 3, -1)
            x = x + attend(*[heads(t, H) for t in a], causal) @ q["wo"] + q["bo"]
            h = jax.nn.gelu(layernorm(x, q["g2"], q["b2"]) @ q["up"] + q["bu"])
            x = x + h @ q["down"]
        return layernorm(x, p["gf"]) @ p["emb"].T

    return fn, p, (jnp.asarray(draw.rng.integers(0, V, (2, T))),)


def llama(stacked):
    """Grouped queries, rotary positions, gated units; unrolled or in a scan with remat."""
    draw = Draw(2)
    lead = (3,) if stacked else ()

    def layer():
        return {
            "g1": draw.near_one(*lead, D),
            "wq": draw(*lead, D, KV * G * K),
            "wk": draw(*lead, D, KV * K),
            "wv": draw(*lead, D, KV * K),
            "wo": draw(*lead, KV * G * K, D),
            "g2": draw.near_one(*lead, D),
            "wi": draw(*lead, D, 2 * F),
            "down": draw(*lead, F, D),
        }

    p = {"emb": draw(V, D, scale=1.0), "gf": draw.near_one(D), "head": draw(D, V)}
    p["layers"] = layer() if stacked else [layer()]

    def block(x, q):
        h = rmsnorm(x, q["g1"])
        a = rope(heads(h @ q["wq"], KV * G))
        k, v = rope(heads(h @ q["wk"], KV)), heads(h @ q["wv"], KV)
        if stacked:
            a = attend(a, jnp.repeat(k, G, 2), jnp.repeat(v, G, 2))
        else:
            a = a.reshape(*a.shape[:2], KV, G, -1)
            s = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", a, k))
            a = jnp.einsum("bkgts,bskd->btkgd", s, v).reshape(*x.shape[:2], -1)
        x = x + a @ q["wo"]
        gate, up = jnp.split(rmsnorm(x, q["g2"]) @ q["wi"], 2, -1)
        return x + (jax.nn.silu(gate) * up) @ q["down"], None

    def fn(p, ids):
        x = p["emb"][ids]
        if stacked:
            x = lax.scan(jax.checkpoint(block), x, p["layers"])[0]
        else:
            for q in p["layers"]:
                x = block(x, q)[0]
        return rmsnorm(x, p["gf"]) @ p["head"]

    return fn, p, (jnp.asarray(draw.rng.integers(0, V, (2, T))),)


def mobile():
    """Batch norm, depthwise and grouped convolutions, a residual connection, pooling."""
    d = Draw(3)
    p = {
        "c1": d(3, 3, 3, 8),
        "n1": batchnorm_params(d, 8),
        "dw": d(3, 3, 1, 8),
        "n2": batchnorm_params(d, 8),
        "pw": d(1, 1, 8, 12),
        "n3": batchnorm_params(d, 12),
        "r": d(3, 3, 12, 12),
        "n4": batchnorm_params(d, 12),
        "gc": d(3, 3, 4, 6),
        "head": d(6, 5),
    }

    def fn(p, x):
        x = jax.nn.relu(batchnorm(p["n1"], conv(x, p["c1"])))
        x = jax.nn.relu(batchnorm(p["n2"], conv(x, p["dw"], groups=8)))
        x = jax.nn.relu(batchnorm(p["n3"], conv(x, p["pw"], 2)))
        x = jax.nn.relu(x + batchnorm(p["n4"], conv(x, p["r"])))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return conv(x, p["gc"], groups=3).mean((1, 2)) @ p["head"]

    return fn, p, (d(2, 8, 8, 3, scale=1.0),)


def unet():
    """A concatenation of two branches; the second is read by another convolution as well."""
    d = Draw(4)
    p = {
        "a": d(3, 3, 3, 4),
        "b": d(3, 3, 4, 6),
        "u": d(3, 3, 6, 5),
        "c": d(3, 3, 9, 7),
        "o": d(1, 1, 7, 2),
    }

    def fn(p, x):
        skip = jax.nn.relu(conv(x, p["a"]))
        deep = jax.nn.relu(conv(skip, p["b"], 2))
        up = jnp.repeat(jnp.repeat(jax.nn.relu(conv(deep, p["u"])), 2, 1), 2, 2)
        return conv(jax.nn.relu(conv(jnp.concatenate([skip, up], -1), p["c"])), p["o"])

    return fn, p, (d(1, 4, 4, 3, scale=1.0),)


def squeeze_excite():
    d = Draw(5)
    p = {"a": d(3, 3, 3, 6), "s": d(6, 2), "e": d(2, 6), "o": d(1, 1, 6, 4)}

    def fn(p, x):
        x = jax.nn.relu(conv(x, p["a"]))
        gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p["s"]) @ p["e"])
        return conv(x * gate[:, None, None], p["o"])

    return fn, p, (d(2, 4, 4, 3, scale=1.0),)


def relu_rnn():
    d = Draw(6)
    p = {"w": d(4, 8), "h": d(8, 8), "o": d(8, 5)}

    def fn(p, x):
        def step(c, xt):
            return jax.nn.relu(xt @ p["w"] + c @ p["h"]), None

        return lax.scan(step, jnp.zeros((x.shape[1], 8)), x)[0] @ p["o"]

    return fn, p, (d(3, 2, 4, scale=1.0),)


def lstm():
    d = Draw(7)
    p = {"w": d(4, 24), "h": d(6, 24), "b": d(24), "o": d(6, 5)}

    def fn(p, x):
        def step(carry, xt):
            c, h = carry
            i, f, g, o = jnp.split(xt @ p["w"] + h @ p["h"] + p["b"], 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), None

        zero = jnp.zeros((x.shape[1], 6))
        return lax.scan(step, (zero, zero), x)[0][1] @ p["o"]

    return fn, p, (d(3, 2, 4, scale=1.0),)


def gru():
    d = Draw(8)
    p = {"w": d(4, 18), "h": d(6, 18), "o": d(6, 5)}

    def fn(p, x):
        def step(h, xt):
            a, b = jnp.split(xt @ p["w"], 3, -1), jnp.split(h @ p["h"], 3, -1)
            r, z = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
            return (1 - z) * jnp.tanh(a[2] + r * b[2]) + z * h, None

        return lax.scan(step, jnp.zeros((x.shape[1], 6)), x)[0] @ p["o"]

    return fn, p, (d(3, 2, 4, scale=1.0),)


def experts():
    """Tokens sorted by expert, ragged products, and put back."""
    d = Draw(9)
    p = {"router": d(4, 3), "up": d(3, 4, 8), "down": d(3, 8, 4)}

    def fn(p, x):
        expert = jnp.argmax(x @ p["router"], -1)
        order = jnp.argsort(expert)
        counts = jnp.bincount(expert, length=3)
        h = jax.nn.relu(lax.ragged_dot(x[order], p["up"], counts))
        return jnp.zeros_like(x).at[order].set(lax.ragged_dot(h, p["down"], counts))

    return fn, p, (d(6, 4, scale=1.0),)


def dense_experts():
    d = Draw(10)
    p = {"up": d(3, 4, 8), "bias": d(3, 8), "down": d(3, 8, 5)}

    def fn(p, x):
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]) + p["bias"][:, None])
        return jnp.einsum("etf,efd->etd", h, p["down"]).sum(0)

    return fn, p, (d(6, 4, scale=1.0),)


def vit():
    """Patches, a class token in front, pre-norm attention, fused qkv as [3, H, K]."""
    d = Draw(11)
    p = {
        "patch": d(2, 2, 3, D, scale=0.3),
        "cls": d(D),
        "pos": d(5, D),
        "g1": d.near_one(D),
        "qkv": d(D, 3, H, K),
        "wo": d(H, K, D),
        "g2": d.near_one(D),
        "up": d(D, F),
        "down": d(F, D),
        "gf": d.near_one(D),
        "head": d(D, 7),
    }

    def fn(p, x):
        x = lax.conv_general_dilated(
            x, p["patch"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x.reshape(x.shape[0], -1, D)
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (x.shape[0], 1, D)), x], 1) + p["pos"]
        q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", layernorm(x, p["g1"]), p["qkv"]), 2, 0)
        a = attend(q, k, v).reshape(*x.shape[:2], H, K)
        x = x + jnp.einsum("bthk,hkd->btd", a, p["wo"])
        x = x + jax.nn.relu(layernorm(x, p["g2"]) @ p["up"]) @ p["down"]
        return layernorm(x[:, 0], p["gf"]) @ p["head"]

    return fn, p, (d(2, 4, 4, 3, scale=1.0),)


def weight_norm():
    d = Draw(12)
    p = {"v": d(4, 8), "g": d.near_one(8), "o": d(8, 5)}

    def fn(p, x):
        w = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
        return jax.nn.relu(x @ w) @ p["o"]

    return fn, p, (d(3, 4, scale=1.0),)


def low_rank():
    d = Draw(13)
    p = {"a": d(4, 8), "w": d(8, 5), "left": d(8, 2), "right": d(2, 5)}

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ (p["w"] + p["left"] @ p["right"])

    return fn, p, (d(3, 4, scale=1.0),)


def branches():
    """cond, while, custom_vjp and a loop whose carry starts at zero."""
    d = Draw(14)
    p = {"w": d(4, 8), "h": d(8, 8), "o": d(8, 5)}

    @jax.custom_vjp
    def act(x):
        return jnp.maximum(x, 0)

    act.defvjp(lambda x: (jnp.maximum(x, 0), x > 0), lambda r, g: (g * r,))

    def fn(p, x):
        y = act(x @ p["w"])
        y = lax.cond(x[0, 0] > 0, lambda y: y * 2, lambda y: jnp.maximum(y, 0.5 * y), y)
        c = lax.fori_loop(0, 3, lambda _, c: jax.nn.relu(y + c @ p["h"]), jnp.zeros_like(y))
        return (
            lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] + y), (0, c))[1] @ p["o"]
        )

    return fn, p, (d(3, 4, scale=1.0),)


NETS = {
    "mlp": mlp,
    "gpt": gpt,
    "llama": lambda: llama(False),
    "llama_stacked": lambda: llama(True),
    "mobile": mobile,
    "unet": unet,
    "squeeze_excite": squeeze_excite,
    "relu_rnn": relu_rnn,
    "lstm": lstm,
    "gru": gru,
    "experts": experts,
    "dense_experts": dense_experts,
    "vit": vit,
    "weight_norm": weight_norm,
    "low_rank": low_rank,
    "branches": branches,
}
