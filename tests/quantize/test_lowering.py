# SPDX-License-Identifier: Apache-2.0
"""The same quantized function lowers for every accelerator, without one."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from twins import RECIPES, default
from twins import draw as normal

import jaxcompress as jc

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


PARAMS = {
    "patch": normal(0, 2, 2, 3, 32),
    "embed": normal(1, 10, 32),
    "qkv": normal(2, 32, 96),
    "out": normal(3, 32, 32),
    "layers": normal(4, 2, 32, 32),
    "norm": jnp.ones(32),
    "head": normal(5, 32, 10),
}
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
IDS = jax.ShapeDtypeStruct((2, 16), jnp.int32)


def model(p, images, ids):
    """Convolution, embedding, attention, a scanned MLP and a head."""
    x = lax.conv_general_dilated(
        images, p["patch"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x.reshape(2, 16, 32) + p["embed"][ids]
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    heads = [a.reshape(2, 16, 4, 8) for a in (q, k, v)]
    x = x + jax.nn.dot_product_attention(*heads).reshape(2, 16, 32) @ p["out"]
    x = lax.scan(jax.checkpoint(lambda x, w: (x + jax.nn.gelu(x @ w), None)), x, p["layers"])[0]
    x = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * p["norm"][None, None]
    return x.mean(1) @ p["head"]


TX = optax.adamw(1e-3)


def step_with(tx):
    def step(p, opt, images, ids):
        loss, g = jax.value_and_grad(lambda p: jnp.mean(model(p, images, ids) ** 2))(p)
        updates, opt = tx.update(g, opt, p)
        return optax.apply_updates(p, updates), opt, loss

    return step


def held_by(recipe):
    """What a step with this recipe holds, and its optimizer."""
    rules = jc.recipes.get(recipe).rules
    if not any(q is not None and q.special for r in rules for q in (r.weight, r.activation)):
        return PARAMS, TX
    ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), (PARAMS, IMAGES, IDS))
    return jc.quant_params(model, recipe)(*ones), jc.quant_tx(TX)


def lower(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=PLATFORMS).as_text()


@pytest.mark.parametrize("recipe", default(jc.recipes.RECIPES, *RECIPES))
def test_forward_and_train_step_lower_everywhere(recipe):
    params, tx = held_by(recipe)
    text = lower(jc.quantize_aware(model, recipe), params, IMAGES, IDS)
    assert "dot_general" in text and "convolution" in text
    plain = lower(model, PARAMS, IMAGES, IDS)
    rounding = "round_nearest_even"  # or a cast to a float format of 8 bits
    assert rounding in text or "f8E4M3FN" in text
    assert rounding not in plain and "f8E4M3FN" not in plain
    opt = jax.eval_shape(tx.init, params)
    text = lower(jc.quantize_aware(step_with(tx), recipe), params, opt, IMAGES, IDS)
    assert rounding in text or "f8E4M3FN" in text


def test_every_site_is_quantized():
    names = ["patch", "embed", "qkv", "out", "layers", "head"]
    report = jc.report(model, "w8a8")(PARAMS, IMAGES, IDS)
    assert [r.site for r in report.rows if r.op and r.weight] == names
    assert all(r.weight.startswith("int8") for r in report.rows if r.op and r.weight)
