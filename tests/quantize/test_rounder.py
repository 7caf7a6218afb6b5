# SPDX-License-Identifier: Apache-2.0
"""Quantizers inside solvers: without correlations GPTQ is rounding to nearest, with their bits."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._quantize.rounder import rounder_of
from jaxcompress._solvers.gptq import gptq

QUANTIZERS = {
    "tensor": jc.Quantizer("int8", "tensor"),
    "asymmetric": jc.Quantizer("uint4", "group:16"),
    "block": jc.Quantizer("int4", "block:4x16"),
    "mse": jc.Quantizer("int3", "group:16", range="mse"),
    "percentile": jc.Quantizer("int4", "group:16", range="percentile", symmetric=False),
    "signed": jc.Quantizer("int4_full", "group:16", convention="signed"),
    "power of two": jc.Quantizer("int4", "group:16", power_of_two="ceil"),
    "twn": jc.Quantizer("ternary", range="twn"),
    "mxfp4": jc.Quantizer("mxfp4"),
    "four over six": jc.Quantizer("nvfp4_four_over_six"),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_without_correlations_gptq_is_the_quantizer(name):
    q = QUANTIZERS[name]
    w = np.random.default_rng(0).standard_t(4, size=(24, 64)).astype(np.float32)
    packed = q.quantize(jnp.asarray(w), 1)
    size = q.granularity.size
    result = gptq(w, np.eye(64), rounder_of(q), group_size=size)
    np.testing.assert_array_equal(result.codes, packed.codes)
    np.testing.assert_allclose(result.w_q, packed.dequantize(), rtol=1e-6)
    scale = np.asarray(result.scales.scale)
    stored = np.asarray(packed.scale)
    if q.granularity.kind == "block":
        scale = scale[::4].reshape(stored.shape[0], -1)
    if q.granularity.kind == "tensor":
        scale = scale[:1]
    np.testing.assert_allclose(
        scale.astype("float32"), stored.reshape(scale.shape).astype("float32"), rtol=1e-6
    )


def test_stored_ranges_and_other_roundings_are_refused():
    for q in (jc.Quantizer("int4", range="learned"), jc.Quantizer("int4", rounding="stochastic")):
        with pytest.raises(jc.RecipeError, match="A solver rounds half to even in a range of"):
            rounder_of(q)
