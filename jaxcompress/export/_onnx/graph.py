# SPDX-License-Identifier: Apache-2.0
"""`Graph`, into which nodes are written, and `Value`, what an equation of the jaxpr became.

A value is a tensor of the graph that may have to be transposed and broadcast before it is what
JAX means; both wait until somebody needs them. Convolutions give channels first and JAX usually
wants them last: what is elementwise between two of them never sees a transpose.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ..._errors import ArtifactError

if TYPE_CHECKING:
    from .quantized import Quantized

# Where dtypes of JAX are those of ONNX, and from which version of the operator set on.
SINCE = {
    "int4": 21, "uint4": 21, "int2": 25, "uint2": 25, "float4_e2m1fn": 23, "float8_e8m0fnu": 24,
    "float8_e4m3fn": 19, "float8_e5m2": 19, "float8_e4m3fnuz": 19, "float8_e5m2fnuz": 19,
    "float6_e2m3fn": 28, "float6_e3m2fn": 28,
}  # fmt: skip
_ALWAYS = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 bfloat16 float32 float64".split()
)


SITE = "|"  # in names of nodes, after that of the site that they compute
_SMALL = 4096  # bytes up to which equal constants are looked for


@dataclasses.dataclass(eq=False)
class Value:
    """What JAX computes, as a tensor of the graph.

    Attributes:
      name: of the tensor.
      shape, dtype: as JAX has them.
      held: sizes of the tensor along the axes of `shape`: 1 where it is still to be broadcast.
      perm: axis i of `shape` is axis perm[i] of the tensor.
      quantized: what it was decoded from, if it was; `name` is then written when it is needed.
      cast_of: the value of another dtype that it was cast from.
    """

    name: str
    shape: tuple
    dtype: np.dtype
    held: tuple
    perm: tuple[int, ...]
    quantized: Quantized | None = None
    cast_of: Value | None = None

    @property
    def moved(self) -> bool:
        """Whether the tensor lies in another order."""
        return self.perm != tuple(range(len(self.perm)))


class Graph:
    """Nodes and initializers of a graph or of a subgraph."""

    def __init__(self, opset: int, parent: Graph | None = None):
        self.opset, self.parent = opset, parent
        self.nodes: list[onnx.NodeProto] = []
        self.scope = ""
        self.root: Graph = self if parent is None else parent.root
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._known: dict[Any, str] = {}
        if parent is None:
            self.counter: Iterator[int] = itertools.count()
            self.arrays: dict[str, np.ndarray] = {}

    def fresh(self, stem: str) -> str:
        """A name that nothing has."""
        return f"{stem}_{next(self.root.counter)}"

    def emit(
        self, op: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attrs
    ) -> Any:
        """Writes a node; the name of its result, or a list of them if `outputs` is not 1."""
        names = [self.fresh(f"{self.scope}{op}") for _ in range(outputs)]
        node = onnx.helper.make_node(op, list(inputs), names, name=names[0], domain=domain, **attrs)
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, stem: str = "const") -> str:
        """The name of an initializer; equal small arrays are one."""
        array = np.asarray(array)
        check_dtype(array.dtype, self.opset)
        known = None
        if array.nbytes <= _SMALL:
            known = (array.dtype.name, array.shape, array.tobytes())
            if known in self._known:
                return self._known[known]
        name = self.fresh(stem)
        dense = np.ascontiguousarray(array).reshape(array.shape)
        self.initializers[name] = onnx.numpy_helper.from_array(dense, name)
        self.root.arrays[name] = array
        if known is not None:
            self._known[known] = name
        return name

    def stored(self) -> list[onnx.TensorProto]:
        """The initializers that its nodes read."""
        used = {name for node in self.nodes for name in names_read(node)}
        return [t for name, t in self.initializers.items() if name in used]

    def ints(self, *numbers: int) -> str:
        """The name of an int64 vector."""
        return self.constant(np.asarray(numbers, np.int64))


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Names of all tensors that a node and its subgraphs read."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from names_read(inner)
            yield from (o.name for o in attribute.g.output)


def check_dtype(dtype: Any, opset: int) -> int:
    """The number that ONNX has for a dtype.

    Raises:
      ArtifactError: there is none, or none in this version of the operator set.
    """
    name = np.dtype(dtype).name
    since = SINCE.get(name)
    if since is None and name not in _ALWAYS:
        raise ArtifactError(
            f"ONNX has no {name}. Compute in another dtype, or leave the site in float."
        )
    if since is not None and opset < since:
        raise ArtifactError(
            f"{name} is in ONNX from opset {since} on, and opset={opset} was asked for. Pass "
            f"opset={since}, or choose another format."
        )
    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
