# SPDX-License-Identifier: Apache-2.0
"""What is done to nodes once all are written: the forms for which runtimes have integer kernels.

    MatMul(dq, dq) + bias            Gemm with the bias in int32, of scale s_x s_w
    Conv(dq, dq) + bias              Conv with the bias in int32
    Q(MaxPool(Relu(Conv)))           MaxPool(Clip(Q(Conv))): on codes, which order as values do
    Conv(dq, dq) without a Q         the product of integers with its patches * s_x s_w + bias
    MatMul(x, dq) + bias             MatMul(x, dq) - (-bias): else they become a Gemm in floats
    uint8 times an int8 weight       uint8 times uint8 with the zero point 128

The third is exact: each of those operations is monotone and maps 0 to 0, and rounding to a grid
that has 0 commutes with it. A bias in int32 moves a result by at most half a unit s_x s_w. The last
is the same product, and exact everywhere: on x86 CPUs without VNNI onnxruntime multiplies uint8 by
int8 with sums of two products that saturate at 16 bits (255 x 127 twice does); where there is VNNI,
and on ARM, both have the same kernel.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx

from .graph import SITE, Graph, names_read
from .patches import integer_conv

_ON_CODES = ("Relu", "Clip", "MaxPool", "Transpose", "Reshape")


def finish(graph: Graph, outputs: list[str], target: str) -> None:
    """All passes, and dead nodes are dropped."""
    prune(graph, outputs)
    if target == "qonnx":
        return
    if target == "onnxruntime":
        _quantize_early(graph, outputs)
        _merge_clips(graph, outputs)
    if target != "tensorrt":
        _bias(graph, outputs)
    if target == "onnxruntime":
        _integer_convs(graph, outputs)
    if target != "tensorrt":
        _unsigned_weights(graph, outputs)
    if target == "onnxruntime":
        _keep_small_weights(graph, outputs)
    prune(graph, outputs)


def prune(graph: Graph, outputs: list[str]) -> None:
    """Drops nodes that nothing reads."""
    wanted, kept = set(outputs), []
    for node in reversed(graph.nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(names_read(node))
    graph.nodes[:] = reversed(kept)


class View:
    """Producers and numbers of readers of the tensors of a graph."""

    def __init__(self, graph: Graph, outputs: list[str]):
        self.graph = graph
        self.by = {name: node for node in graph.nodes for name in node.output}
        self.readers = Counter(n for node in graph.nodes for n in names_read(node))
        self.readers.update(outputs)

    def producer(self, name: str, op: str | None = None) -> onnx.NodeProto | None:
        node = self.by.get(name)
        return node if node is not None and op in (None, node.op_type) else None

    def alone(self, name: str) -> bool:
        return self.readers[name] == 1

    def constant(self, name: str) -> np.ndarray | None:
        return self.graph.root.arrays.get(name)

    def known(self, name: str) -> bool:
        """Whether an input is a constant, or left out."""
        return not name or self.constant(name) is not None

    def decoded(self, name: str) -> onnx.NodeProto | None:
        return self.producer(name, "DequantizeLinear")

    def integers(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """(decoding of the activation, of the weight) of a product on stored ranges."""
        x, w = (self.decoded(n) for n in node.input[:2])
        if x is None or w is None or self.constant(x.input[0]) is not None:
            return None
        codes = self.constant(w.input[0])
        return (x, w) if codes is not None and codes.dtype == np.int8 else None


def _bias(graph: Graph, outputs: list[str]) -> None:
    """An addition of a constant after a product goes into it, in int32."""
    view = View(graph, outputs)
    for add in [n for n in graph.nodes if n.op_type == "Add"]:
        for i in (0, 1):
            bias, name = view.constant(add.input[1 - i]), add.input[i]
            if bias is None or not view.alone(name):
                continue
            node = view.producer(name)
            reshape = node if node is not None and node.op_type == "Reshape" else None
            if reshape is not None:
                node = view.producer(reshape.input[0]) if view.alone(reshape.input[0]) else None
            if node is None or node.op_type not in ("MatMul", "Conv") or len(node.input) != 2:
                continue
            if reshape is not None and node.op_type == "Conv":
                continue
            found = view.integers(node)
            if found is None or not _merge(graph, view, node, found, bias):
                continue
            last = reshape if reshape is not None else node
            last.output[0] = add.output[0]
            graph.nodes.remove(add)
            view = View(graph, outputs)
            break


def _merge(graph: Graph, view: View, node: onnx.NodeProto, found: tuple, bias: np.ndarray) -> bool:
    x, w = found
    codes, sx, sw = (view.constant(n) for n in (w.input[0], x.input[1], w.input[1]))
    assert codes is not None and sx is not None and sw is not None
    conv = node.op_type == "Conv"
    columns = codes.shape[0 if conv else 1]
    wide = [a for a, n in enumerate(bias.shape) if n != 1]
    if conv:
        fits = not wide or (wide == [1] and bias.ndim == codes.ndim)
    else:  # trailing axes, and all of them
        fits = not wide or wide == list(range(min(wide), bias.ndim))
    if not fits or bias.size not in (1, columns) or bias.dtype != np.float32:
        return False
    scale = np.broadcast_to((sx * sw).astype(np.float32), (columns,))
    whole = np.rint(np.broadcast_to(bias.reshape(-1), (columns,)).astype(np.float64) / scale)
    if np.abs(whole).max(initial=0) >= 2**31:
        return False
    at = graph.nodes.index(node)
    parts = [
        graph.constant(whole.astype(np.int32)),
        graph.constant(scale.copy()),
        graph.constant(np.zeros(columns, np.int32)),
    ]
    name = graph.fresh("bias")
    graph.nodes.insert(
        at, onnx.helper.make_node("DequantizeLinear", parts, [name], name=name, axis=0)
    )
    node.input.append(name)
    if not conv:
        node.op_type = "Gemm"
    return True


def _quantize_early(graph: Graph, outputs: list[str]) -> None:
    """A quantizer moves up to the product, past operations that can be done on codes."""
    view = View(graph, outputs)
    for quantize in [n for n in graph.nodes if n.op_type == "QuantizeLinear"]:
        chain, name = [], quantize.input[0]
        while (
            view.alone(name)
            and (node := view.producer(name)) is not None
            and node.op_type in _ON_CODES
        ):
            if node.op_type == "Clip" and not all(map(view.known, node.input[1:])):
                break
            chain.append(node)
            name = node.input[0]
        # A bias in between is added by the product; it is merged later.
        node = view.producer(name)
        product = node
        if node is not None and node.op_type == "Add" and view.alone(name):
            product = next((view.producer(n) for n in node.input if view.constant(n) is None), None)
        if (
            not chain
            or not view.alone(name)
            or product is None
            or product.op_type not in ("Conv", "MatMul", "Gemm")
        ):
            continue
        if view.integers(product) is None:
            continue
        scale, point = (view.constant(n) for n in quantize.input[1:3])
        if scale is None or point is None or scale.ndim:
            continue
        ends = [_ends(graph, view, step, scale, point) for step in chain]
        for step, end in zip(chain, ends, strict=True):
            if end is not None:
                step.op_type = "Clip"
                del step.input[1:]
                step.input.extend(end)
        graph.nodes.remove(quantize)
        first, code = chain[-1], quantize.output[0]
        moved = graph.fresh("QuantizeLinear")
        graph.nodes.insert(graph.nodes.index(first), quantize)
        quantize.input[0], quantize.output[0] = name, moved
        first.input[0] = moved
        chain[0].output[0] = code
        view = View(graph, outputs)


def _merge_clips(graph: Graph, outputs: list[str]) -> None:
    """Two Clips of codes become one, and one that clips nothing is dropped."""
    view = View(graph, outputs)
    for clip in [n for n in graph.nodes if n.op_type == "Clip" and len(n.input) == 3]:
        low, high = (view.constant(name) for name in clip.input[1:])
        if low is None or high is None or low.dtype.kind not in "iu":
            continue
        before = view.producer(clip.input[0], "Clip")
        if before is not None and len(before.input) == 3 and view.alone(clip.input[0]):
            least, most = (view.constant(name) for name in before.input[1:])
            if least is not None and most is not None:
                low, high = np.maximum(low, least), np.minimum(high, most)
                parts = [before.input[0], graph.constant(low), graph.constant(high)]
                del clip.input[:]
                clip.input.extend(parts)
                graph.nodes.remove(before)
        info = np.iinfo(low.dtype)
        if (int(low), int(high)) == (info.min, info.max) and clip.output[0] not in outputs:
            for node in graph.nodes:
                for i, name in enumerate(node.input):
                    if name == clip.output[0]:
                        node.input[i] = clip.input[0]
            graph.nodes.remove(clip)
        view = View(graph, outputs)


def _ends(
    graph: Graph, view: View, step: onnx.NodeProto, scale: np.ndarray, point: np.ndarray
) -> list[str] | None:
    """The ends of a Clip on codes that is what a step is on values; None if it clips nothing."""
    if step.op_type not in ("Relu", "Clip"):
        return None
    info = np.iinfo(point.dtype)
    ends = [int(info.min), int(info.max)]
    if step.op_type == "Relu":
        ends[0] = int(point)
    else:
        for i, name in enumerate(step.input[1:3]):
            value = view.constant(name)
            if value is not None:
                code = np.rint(value / scale) + int(point)
                ends[i] = int(np.clip(code, info.min, info.max))
    return [graph.constant(np.asarray(e, point.dtype)) for e in ends]


def _integer_convs(graph: Graph, outputs: list[str]) -> None:
    """A convolution whose result is not quantized, which no kernel takes, as a product."""
    view = View(graph, outputs)
    for conv in [n for n in graph.nodes if n.op_type == "Conv"]:
        found = view.integers(conv)
        next_ones = [n for n in graph.nodes if conv.output[0] in n.input]
        if found is None or [n.op_type for n in next_ones] == ["QuantizeLinear"]:
            continue
        x, w = found
        sx, sw = (view.constant(n) for n in (x.input[1], w.input[1]))
        codes = view.constant(w.input[0])
        assert sx is not None and sw is not None and codes is not None
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in conv.attribute}
        at, count = graph.nodes.index(conv), len(graph.nodes)
        graph.scope = conv.name.split(SITE)[0] + SITE
        out = integer_conv(graph, x.input[0], codes, x.input[2], [], sx * sw, attributes)
        if len(conv.input) > 2:
            merged = view.decoded(conv.input[2])
            assert merged is not None
            whole, unit = (view.constant(n) for n in merged.input[:2])
            bias = (whole * unit).astype(np.float32)  # type: ignore[operator]
            shape = (1, -1, *[1] * (codes.ndim - 2))
            graph.emit("Add", [out, graph.constant(bias.reshape(shape))])
        graph.scope = ""
        new = graph.nodes[count:]
        del graph.nodes[count:]
        new[-1].output[0] = conv.output[0]
        graph.nodes[at : at + 1] = new
        view = View(graph, outputs)


def _keep_small_weights(graph: Graph, outputs: list[str]) -> None:
    """onnxruntime merges an addition before it sees that the weight is small; a subtraction not."""
    view = View(graph, outputs)
    for add in [n for n in graph.nodes if n.op_type == "Add"]:
        for i in (0, 1):
            bias, node = view.constant(add.input[1 - i]), view.producer(add.input[i], "MatMul")
            if bias is None or node is None or view.decoded(node.input[1]) is None:
                continue
            name = add.input[i]
            add.op_type = "Sub"
            del add.input[:]
            add.input.extend([name, graph.constant(-bias)])
            break


def _unsigned_weights(graph: Graph, outputs: list[str]) -> None:
    """Weights of products of integers in uint8, if sums of two products could leave 16 bits."""
    view = View(graph, outputs)

    def moved(node: onnx.NodeProto, code: int, zero: int) -> None:
        codes = view.constant(node.input[code])
        if codes is None or codes.dtype != np.int8:
            return
        if np.abs(codes.astype(np.int16)).max(initial=0) <= 64:
            return
        while len(node.input) <= zero:
            node.input.append("")
        point = view.constant(node.input[zero]) if node.input[zero] else np.int8(0)
        assert point is not None
        stem = re.sub(r"_\d+$", "", node.input[code])
        for i, x, name in ((code, codes, stem), (zero, point, f"{stem}.zero_point")):
            shifted = (np.asarray(x, np.int16) + 128).astype(np.uint8)
            node.input[i] = graph.constant(shifted, name)

    for node in list(graph.nodes):
        if node.op_type in ("MatMulInteger", "ConvInteger") and len(node.input) > 2:
            moved(node, 1, 3)  # a zero point says that the left operand is uint8
        elif node.op_type in ("MatMul", "Gemm", "Conv") and (found := view.integers(node)):
            moved(found[1], 0, 2)
