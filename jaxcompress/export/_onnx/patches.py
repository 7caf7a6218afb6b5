# SPDX-License-Identifier: Apache-2.0
"""Convolutions of integers: as one product with the patches of the image side by side.

onnxruntime has one kernel for a convolution of integers whose result is not rounded, ConvInteger,
which is 4 to 10 times slower than its convolution of floats; its products of integers are fast. The
integers are the same: patches are copies.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx

from .graph import Graph


def integer_conv(
    graph: Graph,
    codes: str,
    weight: np.ndarray,
    point: str,
    factors: list[str],
    scale: np.ndarray,
    spatial: dict[str, Any],
) -> str:
    """The name of the float32 convolution, [N, out, *spatial].

    Args:
      graph: that is written to.
      codes: name of the uint8 image, [N, in, *spatial].
      weight: int8 [out, in / groups, *kernel].
      point: name of the zero point of the image, uint8.
      factors: names of what the sums are multiplied by, shapes that broadcast to the image with
        one channel and no positions.
      scale: float32 [out], what they are multiplied by then.
      spatial: the attributes of Conv.
    """
    rank = weight.ndim - 2
    if spatial.get("group", 1) == 1:
        patches = _patches(graph, codes, point, rank, spatial)
        order = (*range(2, rank + 2), 1, 0)
        rows = graph.constant(weight.transpose(order).reshape(-1, len(weight)), "kernel")
        total = graph.emit("MatMulInteger", [patches, rows, point])
        shape, back = (-1,), [0, rank + 1, *range(1, rank + 1)]
    else:
        total = graph.emit("ConvInteger", [codes, graph.constant(weight), point], **spatial)
        shape, back = (1, -1, *[1] * rank), None
    out = graph.emit("Cast", [total], to=onnx.TensorProto.FLOAT)
    for factor in (*factors, graph.constant(scale.astype(np.float32).reshape(shape))):
        out = graph.emit("Mul", [out, factor])
    return out if back is None else graph.emit("Transpose", [out], perm=back)


def _patches(graph: Graph, codes: str, point: str, rank: int, spatial: dict[str, Any]) -> str:
    """[N, *spatial, kernel positions * in] of the image, which may be of any size."""
    kernel, strides = spatial["kernel_shape"], spatial["strides"]
    dilations = spatial.get("dilations", [1] * rank)
    pads = spatial.get("pads", [0] * 2 * rank)
    image = graph.emit("Transpose", [codes], perm=[0, *range(2, rank + 2), 1])
    if any(pads):
        ends = graph.ints(0, *pads[:rank], 0, 0, *pads[rank:], 0)
        image = graph.emit("Pad", [image, ends, point])
    if set(kernel) == set(strides) == {1}:
        return image
    parts, steps = [], graph.ints(*strides)
    axes = graph.ints(*range(1, rank + 1))
    for at in itertools.product(*map(range, kernel)):
        start = [i * d for i, d in zip(at, dilations, strict=True)]
        # As far from the end as the last position of the kernel is from this one.
        left = [(n - 1) * d - s for n, d, s in zip(kernel, dilations, start, strict=True)]
        end = [-n if n else np.iinfo(np.int64).max for n in left]
        inputs = [image, graph.ints(*start), graph.ints(*end), axes, steps]
        parts.append(graph.emit("Slice", inputs))
    return parts[0] if len(parts) == 1 else graph.emit("Concat", parts, axis=-1)
