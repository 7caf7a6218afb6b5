# SPDX-License-Identifier: Apache-2.0
"""`QTensor`: a pytree node that stands for an array and stores packed codes and scales.

Nothing here depends on how scales are found. Axes are counted from the end, so that what holds
for an array holds for its slices along leading axes: a stack of QTensors can be scanned and mapped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .. import formats
from .._errors import FormatError
from ..formats import Format
from ..formats._base import multiply
from .blocks import Blocks, Tiles


class Stored:
    """What stands for an array, of a `shape` and `dtype`, that `dequantize()` computes."""

    __array_ufunc__ = None  # a NumPy array times one is what `__rmatmul__` makes of it

    def dequantize(self) -> jax.Array:
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor(Stored):
    """An array stored as codes of a number format and scales. Made by `Quantizer.quantize`.

    A pytree with the leaves `packed`, `scale` and, where there are any, `packed_zero_point` and
    `global_scale`.
    Leading axes that the scales keep too may be sliced off all leaves (scan) or added (vmap).
    What moves values without computing new ones (`.T`, `.reshape`, indexing) moves codes and
    scales; where it cannot, that is an error. Inside a function that a transform changes
    (`jc.with_qtensors`, `jc.quantize_aware`) a QTensor is an array.

    Attributes:
        packed: the codes; uint8 packed along one axis below 8 bits, else their own dtype.
        scale: broadcasts to the array, or to `blocks.split` of it; float32, or as the format
            stores it: uint8 exponents (MX, bias 127), float8_e4m3fn (NVFP4).
        packed_zero_point: zero points packed like the codes, or None; shaped like `scale`.
        format: the number format.
        dtype: of the array this stands for.
        unused: how many codes at the end of each packed row are no values of the array.
        blocks: how the array is cut into groups; None without groups.
        axis: the packed axis, negative; from 8 bits up the one along which codes lie.
        global_scale: float32, of formats with two levels of scales: one for the array, or one
            for each index of its leading axes; or None.
    """

    packed: jax.Array
    scale: jax.Array
    packed_zero_point: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    unused: int = dataclasses.field(default=0, metadata={"static": True})
    blocks: Blocks | Tiles | None = dataclasses.field(default=None, metadata={"static": True})
    axis: int = dataclasses.field(default=-1, metadata={"static": True})
    global_scale: jax.Array | None = None

    @classmethod
    def from_codes(
        cls,
        codes: jax.Array,
        scale: jax.Array,
        zero_point: jax.Array | None = None,
        *,
        format: str | Format,
        dtype: Any,
        blocks: Blocks | Tiles | None = None,
        global_scale: jax.Array | None = None,
        axis: int = -1,
    ) -> QTensor:
        """Packs codes in the layout of the array.

        Args:
            codes: of the dtype of the format, at least one axis.
            scale: broadcasts to the codes, or to `blocks.split` of them; float32, or of the
                `scale_dtype` of the format.
            zero_point: integers in the range of the format, shaped like `scale`, or None.
            format: the number format or its name.
            dtype: of the array.
            blocks: how the scales are laid out, if not along whole axes.
            global_scale: float32, multiplies all scales, or those of each index of the leading
                axes that it has; or None.
            axis: the axis to pack along, negative.

        Example:
            >>> import jax.numpy as jnp, jaxcompress as jc
            >>> codes = jnp.array([[1, -7], [3, 2]], jnp.int8)
            >>> q = jc.QTensor.from_codes(codes, jnp.ones((1, 1)), format="int4", dtype="float32")
            >>> q.nbytes, q.shape
            (6, (2, 2))
        """
        fmt = formats.get(format)
        if zero_point is not None:
            zero_point = pack_along(zero_point.astype(fmt.dtype), fmt, -1)
        packed, dtype = pack_along(codes, fmt, axis), jnp.dtype(dtype)
        unused = _row(packed.shape[axis], fmt) - codes.shape[axis]
        return cls(packed, scale, zero_point, fmt, dtype, unused, blocks, axis, global_scale)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.packed.shape)
        shape[self.axis] = _row(shape[self.axis], self.format) - self.unused
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.packed.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: packed codes, scales, zero points, global scale, a codebook's table."""
        return nbytes(self)

    @property
    def codes(self) -> jax.Array:
        """The codes, of the dtype of the format, in the shape of the array."""
        return _unpack(self.packed, self.format, self.shape[self.axis], self.axis)

    @property
    def zero_point(self) -> jax.Array | None:
        """The zero points, of the dtype of the format, in the shape of `scale`; or None."""
        if self.packed_zero_point is None:
            return None
        return _unpack(self.packed_zero_point, self.format, self.scale.shape[-1], -1)

    def dequantize(self) -> jax.Array:
        """Returns the array, (codes - zero_point) * scale in float32, cast to `dtype`.

        With a global scale the scale is `scale * global_scale`.

        Example:
            >>> import jax.numpy as jnp, jaxcompress as jc
            >>> jc.Quantizer("int4").quantize(jnp.array([[7.0], [-2.2]]), axis=0).dequantize()
            Array([[ 7.],
                   [-2.]], dtype=float32)
        """
        return _dequantized(self)

    @property
    def T(self) -> QTensor:
        return self._moved("T", lambda a: a.T)

    def transpose(self, *axes: int | Sequence[int]) -> QTensor:
        """As `jnp.transpose`: no code is unpacked, since the packed axis moves too."""
        return self._moved(f"transpose{axes}", lambda a: a.transpose(*axes))

    def reshape(self, *shape: int | Sequence[int]) -> QTensor:
        """As `jnp.reshape`, where values that share a scale stay together."""
        return self._moved(f"reshape{shape}", lambda a: a.reshape(*shape))

    def astype(self, dtype: Any) -> QTensor:
        """As of the array: a float32 QTensor becomes one of another floating dtype."""
        return self._moved(f"astype({jnp.dtype(dtype)})", lambda a: a.astype(dtype))

    def __getitem__(self, index: Any) -> QTensor:
        """Slices, integers and rows by number, where groups stay whole."""
        return self._moved(f"indexing with {index!r}", lambda a: a[index])

    def __matmul__(self, other: Any) -> jax.Array:
        return self._run(lambda a: a @ other)

    def __rmatmul__(self, other: Any) -> jax.Array:
        return self._run(lambda a: other @ a)

    def _run(self, fn: Any) -> Any:
        from .interpret import apply  # it builds on this module

        return apply(fn, self)

    def _moved(self, what: str, fn: Any) -> QTensor:
        out = self._run(fn)
        if not isinstance(out, QTensor):
            cut = "" if self.blocks is None else f", cut by {self.blocks}"
            raise FormatError(
                f"{what} of a QTensor ({self.format.name}, {self.dtype}, shape {self.shape}, "
                f"scales {self.scale.shape}{cut}) needs values that are not stored: its groups "
                "would not stay whole, or it computes. Use .dequantize() first."
            )
        return out

    def partition(self, sharding: Any) -> QTensor:
        """Returns how its arrays are split when it is split like this: a QTensor of shardings.

        Scales go with their values; what values share is on every device.

        Args:
            sharding: a `NamedSharding` (for `jax.device_put`, `jax.jit`) or a `PartitionSpec` with
                axis sizes from the mesh in context (for `jax.shard_map`).

        Raises:
            FormatError: if a device would get a part of a byte or of a group.

        Example:
            >>> import jax, jax.numpy as jnp, jaxcompress as jc
            >>> from jax.sharding import NamedSharding, PartitionSpec as P
            >>> q = jc.Quantizer("int4").quantize(jnp.ones((8, 8)), axis=0)
            >>> sharding = NamedSharding(jax.make_mesh((1,), ("data",)), P(None, "data"))
            >>> jax.device_put(q, q.partition(sharding)).scale.sharding.spec == P(None, "data")
            True
        """
        from .qsharding import partition

        named = isinstance(sharding, NamedSharding)
        mesh = sharding.mesh if named else jax.sharding.get_abstract_mesh()
        spec: PartitionSpec = sharding.spec if named else sharding
        out = partition(self, spec, dict(mesh.shape))
        if out is None:
            raise FormatError(
                f"a QTensor ({self.format.name}, shape {self.shape}, packed along axis "
                f"{self.axis}, scales {self.scale.shape}) cannot be split as {spec} over "
                f"{dict(mesh.shape)}: a device would get a part of a byte or of a group. Split "
                "another axis, or choose groups that fit."
            )
        return jax.tree.map(lambda s: NamedSharding(mesh, s), out) if named else out


def is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)


def is_stored(x: Any) -> bool:
    """Whether x is a QTensor or a SparseTensor."""
    return isinstance(x, Stored)


def dequantized(x: Any) -> Any:
    """The array that a QTensor or SparseTensor stands for; anything else as it is."""
    return x.dequantize() if isinstance(x, Stored) else x


def abstract(q: Stored) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that x stands for, as JAX traces it."""
    return jax.eval_shape(lambda q: q.dequantize(), q)


def nbytes(tree: Any) -> int:
    """Returns the bytes that the arrays of a pytree take in storage.

    Sub-byte dtypes count packed, 8 // bits values to a byte. Of a QTensor packed codes, scales and
    zero points count, and 4 bytes for each number of a codebook that is not a standard one.

    Args:
        tree: of arrays, QTensors or `jax.ShapeDtypeStruct`s.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> jc.nbytes({"w": jnp.zeros((3, 5), jnp.bfloat16), "b": jnp.zeros(3, jnp.int4)})
        32
    """
    arrays = sum(-(-math.prod(np.shape(a)) * _bits(a) // 8) for a in jax.tree.leaves(tree))
    nodes = jax.tree.leaves(tree, is_leaf=is_qtensor)
    return arrays + sum(q.format.table_nbytes for q in nodes if is_qtensor(q))


def _bits(leaf: Any) -> int:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return dtype.itemsize * 8


def _row(count: int, fmt: Format) -> int:
    """How many codes so many bytes (codes, from 8 bits up) of a packed row have room for."""
    codes, taken = fmt.unit
    return count * codes // taken


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def pack_along(codes: jax.Array, fmt: Format, axis: int) -> jax.Array:
    """Codes packed along an axis; unpacked from 8 bits up."""
    if fmt.code_bits >= 8:
        return codes
    return jnp.moveaxis(fmt.pack(jnp.moveaxis(codes, axis, -1)), -1, axis)


# One program for an array instead of one for each operation.
@functools.partial(jax.jit, inline=True)
def _dequantized(q: QTensor) -> jax.Array:
    codes = q.codes if q.blocks is None else q.blocks.split(q.codes)
    x = q.format.from_codes(codes)
    if (zero_point := q.zero_point) is not None:
        x = x - zero_point.astype(jnp.float32)
    g = q.global_scale
    if g is not None and g.ndim:  # one for each index of leading axes
        g = g.reshape(*g.shape, *(1,) * (q.scale.ndim - g.ndim))
    x = multiply(x, q.format.factors(q.scale, g))
    if q.blocks is not None:
        x = q.blocks.merge(x, q.shape)
    return x.astype(q.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _unpack(packed: jax.Array, fmt: Format, size: int, axis: int) -> jax.Array:
    if fmt.code_bits >= 8:
        return packed
    return jnp.moveaxis(fmt.unpack(jnp.moveaxis(packed, axis, -1), size), -1, axis)


# `jax.export` stores what is static of a QTensor as JSON; nothing is ever unpickled.


def _to_json(static: tuple) -> bytes:
    fmt, dtype, unused, blocks, axis = static
    cuts = (
        [blocks] if isinstance(blocks, Blocks) else [blocks.columns, blocks.rows] if blocks else []
    )
    data = {
        "format": formats.to_data(fmt),
        "dtype": jnp.dtype(dtype).name,
        "unused": unused,
        "blocks": [dataclasses.asdict(cut) for cut in cuts if cut],
        "axis": axis,
    }
    return json.dumps(data).encode()


def _from_json(text: bytes | bytearray) -> tuple:
    data = json.loads(bytes(text))
    cuts = [Blocks(tuple(cut["axis"]), cut["size"]) for cut in data["blocks"]]
    blocks = Tiles(*cuts) if len(cuts) == 2 else (cuts or [None])[0]
    fmt, dtype = formats.get(data["format"]), jnp.dtype(data["dtype"])
    return fmt, dtype, data["unused"], blocks, data["axis"]


jax.export.register_pytree_node_serialization(
    QTensor,
    serialized_name="jaxcompress.QTensor",
    serialize_auxdata=_to_json,
    deserialize_auxdata=_from_json,
)
