# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder of `examples/minilm.py` as a Flax Linen module, its six layers one by one.

    jaxcompress compress examples/minilm_linen.py --recipe w4a16-g32 --method gptq
    python examples/minilm_linen.py

The same weights under the names that Linen gives them: nothing in the library knows either.
"""

import functools
import importlib.util
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

path = pathlib.Path(__file__).with_name("minilm.py")
spec = importlib.util.spec_from_file_location("minilm", path)
minilm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(minilm)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, bias):
        split = lambda y: y.reshape(*y.shape[:2], minilm.HEADS, -1)  # noqa: E731
        q, k, v = (split(nn.Dense(384, name=name)(x)) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-12)
        x = norm(name="norm_attention")(x + nn.Dense(384, name="out")(mixed.reshape(x.shape)))
        hidden = jax.nn.gelu(nn.Dense(1536, name="up")(x), approximate=False)
        return norm(name="norm")(x + nn.Dense(384, name="down")(hidden))


class MiniLM(nn.Module):
    @nn.compact
    def __call__(self, x):
        """Embeddings float32[n, 384] of length 1 of token numbers and mask, int32[2, n, tokens]."""
        ids, mask = x[0], x[1]
        h = nn.Embed(30522, 384, name="words")(ids)
        h = h + nn.Embed(512, 384, name="positions")(jnp.arange(ids.shape[1]))[None]
        h = h + self.param("kind", nn.initializers.zeros, (384,))[None, None]
        h = nn.LayerNorm(epsilon=1e-12, name="norm")(h)
        bias = jnp.where(mask > 0, 0.0, -1e9)[:, None, None]
        for i in range(6):
            h = Layer(name=f"layer_{i}")(h, bias)
        m = mask[..., None].astype(h.dtype)
        z = jnp.sum(h * m, 1) / jnp.sum(m, 1)
        return z / jnp.sqrt(jnp.sum(z**2, -1, keepdims=True))


def linen(params):
    """The parameters of `minilm.apply` for the module."""
    norm = lambda p: {"scale": p["w"], "bias": p["b"]}  # noqa: E731
    dense = lambda p: {"kernel": p["w"].T, "bias": p["b"]}  # noqa: E731
    out = {
        "words": {"embedding": params["words"]},
        "positions": {"embedding": params["positions"]},
        "kind": params["kind"],
        "norm": norm(params["norm"]),
    }
    for i in range(6):
        one = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        out[f"layer_{i}"] = {k: (norm if "norm" in k else dense)(p) for k, p in one.items()}
    return {"params": out}


apply = MiniLM().apply
task = jc.Task("minilm_linen", apply, linen(minilm.params), minilm.batches, minilm.evaluate)


def main():
    x = minilm.encode(minilm.documents[:25])
    gap = jnp.max(jnp.abs(apply(task.params, x) - minilm.apply(minilm.params, x)))
    print(f"largest difference to the plain function {float(gap):.1e}")
    for recipe, method in (("w8a8", "rtn"), ("w4a16-g32", "gptq")):
        small = jc.quantize(apply, task.params, recipe, calibration=minilm.batches, method=method)
        found = minilm.evaluate(functools.partial(jax.jit(small.fn), small.params))
        numbers = f"pearson {found['pearson']:.4f}  cosine {found['cosine']:.4f}"
        print(f"{recipe:10} {method:5} {numbers}  {jc.nbytes(small.params):,} bytes", flush=True)


if __name__ == "__main__":
    main()
