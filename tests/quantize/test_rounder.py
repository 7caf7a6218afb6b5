# SPDX-License-Identifier: Apache-2.0
"""Quantizers inside solvers round as they do outside, and GPTQ does without correlations."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._quantize.rounder import QuantizerRounder
from jaxcompress._solvers.gptq import gptq
from jaxcompress._solvers.rounder import find_scales, round_to

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


W = np.random.default_rng(0).standard_t(4, size=(24, 64)).astype(np.float32)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_rounding_to_nearest_is_the_quantizer(name):
    q = QUANTIZERS[name]
    packed, size = q.quantize(jnp.asarray(W), 1), q.granularity.size
    scales = find_scales(W, QuantizerRounder(q), group_size=size)
    codes, values = round_to(W, QuantizerRounder(q), scales, group_size=size)
    np.testing.assert_array_equal(codes, packed.codes)
    np.testing.assert_allclose(values, packed.dequantize(), rtol=1e-6)
    step = {"block": q.granularity.rows, "tensor": len(W)}.get(q.granularity.kind, 1)
    found, stored = np.asarray(scales.scale)[::step], np.asarray(packed.scale)
    found, stored = (np.asarray(a, np.float32).ravel() for a in (found, stored))
    np.testing.assert_allclose(found, stored, rtol=1e-6)


@pytest.mark.parametrize("name", ["block", "four over six"])
def test_without_correlations_gptq_is_the_quantizer(name):
    q = QUANTIZERS[name]
    result = gptq(W, np.eye(64), QuantizerRounder(q), group_size=q.granularity.size)
    packed = q.quantize(jnp.asarray(W), 1)
    np.testing.assert_array_equal(result.codes, packed.codes)
    np.testing.assert_allclose(result.w_q, packed.dequantize(), rtol=1e-6)


def test_stored_ranges_and_other_roundings_are_refused():
    for q in (jc.Quantizer("int4", range="learned"), jc.Quantizer("int4", rounding="stochastic")):
        with pytest.raises(jc.RecipeError, match="A solver rounds half to even in a range of"):
            QuantizerRounder(q)
