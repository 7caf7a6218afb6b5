# SPDX-License-Identifier: Apache-2.0
"""Convolutions of integers as products of patches: every window, in the function's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import Quantizer, Recipe, Rule

# (shape of the image, of the kernel, strides, padding, dilation, groups)
WINDOWS = {
    "plain": ((2, 9, 8, 3), (3, 3, 3, 5), (1, 1), "VALID", (1, 1), 1),
    "same": ((2, 9, 8, 3), (3, 3, 3, 5), (1, 1), "SAME", (1, 1), 1),
    "strided": ((2, 9, 8, 3), (3, 2, 3, 5), (2, 3), "SAME", (1, 1), 1),
    "longer strides than windows": ((2, 9, 8, 3), (2, 1, 3, 5), (3, 2), "VALID", (1, 1), 1),
    "dilated": ((2, 11, 12, 3), (3, 2, 3, 5), (1, 2), "SAME", (2, 3), 1),
    "uneven padding": ((2, 7, 8, 3), (4, 3, 3, 5), (2, 1), ((0, 3), (2, 1)), (1, 1), 1),
    "one place": ((2, 7, 8, 3), (1, 1, 3, 5), (1, 1), "VALID", (1, 1), 1),
    "one place, strided": ((2, 7, 8, 3), (1, 1, 3, 5), (2, 2), "VALID", (1, 1), 1),
    "whole image": ((2, 4, 5, 3), (4, 5, 3, 6), (1, 1), "VALID", (1, 1), 1),
    "one axis": ((2, 9, 3), (4, 3, 5), (2,), "SAME", (1,), 1),
    "three axes": ((1, 5, 6, 4, 2), (2, 3, 2, 2, 3), (1, 2, 1), "SAME", (1, 1, 1), 1),
    "groups": ((2, 9, 8, 6), (3, 3, 2, 9), (2, 1), "SAME", (1, 1), 3),
}
RECIPES = {
    "w8a8": "w8a8",
    "measured": Recipe([Rule("*", "int8", Quantizer("uint8", "tensor"))], "measured"),
    "static": Recipe([Rule("*", "int8", Quantizer("uint8", "tensor", range="static"))], "static"),
}


@pytest.mark.cover
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name, recipe, tmp_path):
    shape, kernel, strides, padding, dilation, groups = WINDOWS[name]
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(0.2, 1, s), jnp.float32) for s in (kernel, shape))
    axes = "DHW"[3 - len(strides) :]
    spec = (f"N{axes}C", f"{axes}IO", f"N{axes}C")

    def conv(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], strides, padding, rhs_dilation=dilation, dimension_numbers=spec,
            feature_group_count=groups,
        )  # fmt: skip

    small = jc.quantize(conv, {"w": w}, RECIPES[recipe], calibration=[x])
    open_sizes = jax.export.symbolic_shape("batch, " + ", ".join(map(str, shape[1:])))
    abstract = jax.ShapeDtypeStruct(open_sizes, x.dtype)
    found = jc.export.onnx(small.fn, small.params, abstract, path=tmp_path / "m.onnx", strict=True)
    want = np.asarray(jax.jit(small.fn)(small.params, x))
    np.testing.assert_allclose(found.run(x), want, atol=2e-6 * np.abs(want).max())
    (row,) = found.audit().rows
    kernels = ("ConvInteger",) if groups > 1 else ("MatMulInteger", "MatMulIntegerToFloat")
    assert row.runs in kernels


def test_images_of_any_size(tmp_path):
    rng = np.random.default_rng(1)
    w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 3, 2, 4), (2, 9, 8, 2)))
    conv = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (2, 2), ((1, 1), (0, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    small = jc.quantize(conv, {"w": w}, "w8a8", calibration=[x])
    sizes = jax.export.symbolic_shape("n, h, w, 2", constraints=["h >= 3", "w >= 3"])
    abstract = jax.ShapeDtypeStruct(sizes, x.dtype)
    found = jc.export.onnx(small.fn, small.params, abstract, path=tmp_path / "m.onnx")
    for image in (x, x[:1, :5], jnp.tile(x, (1, 2, 3, 1))):
        want = np.asarray(jax.jit(small.fn)(small.params, image))
        np.testing.assert_allclose(found.run(image), want, atol=2e-6 * np.abs(want).max())
