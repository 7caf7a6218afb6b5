# SPDX-License-Identifier: Apache-2.0
"""`QTensor`: a pytree node that stands for an array and stores packed codes and scales.

Nothing here depends on how scales are found. Axes are counted from the end, so that what holds
for an array holds for its slices along leading axes: a stack of QTensors can be scanned and mapped.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import formats
from ..formats import Format
from ..formats._base import multiply


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Cuts axes of an array, flattened in the order given, into blocks of consecutive values.

    Attributes:
        axis: the axes to flatten and cut, negative.
        size: values in a block; the last block is filled up with zeros.
    """

    axis: tuple[int, ...]
    size: int

    def split(self, x: jax.Array) -> jax.Array:
        """Returns x with its axes replaced, where the first of them was, by (blocks, size)."""
        order, before, length, after = self._parts(x.shape)
        flat = lax.reshape(lax.transpose(x, order), (*before, length, *after))
        if gap := -length % self.size:
            pads = [(0, gap if i == len(before) else 0, 0) for i in range(flat.ndim)]
            flat = lax.pad(flat, np.zeros((), x.dtype), pads)
        return lax.reshape(flat, self.split_shape(x.shape))

    def merge(self, v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `split` of an array of that shape; drops the filling."""
        order, before, length, after = self._parts(shape)
        flat = lax.reshape(v, (*before, -(-length // self.size) * self.size, *after))
        flat = lax.slice_in_dim(flat, 0, length, axis=len(before))
        permuted = lax.reshape(flat, tuple(shape[a] for a in order))
        return lax.transpose(permuted, tuple(np.argsort(order).tolist()))

    def split_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of `split` of an array of that shape."""
        _, before, length, after = self._parts(shape)
        return (*before, -(-length // self.size), self.size, *after)

    def inner_axis(self, ndim: int) -> int:
        """Returns the axis of `split` that runs inside a block, for an array of `ndim` axes."""
        return min(a % ndim for a in self.axis) + 1

    def inner_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of `split` that run inside a block, for an array of `ndim` axes."""
        return (self.inner_axis(ndim),)

    def _parts(self, shape: tuple[int, ...]) -> tuple[Any, Any, int, Any]:
        """Returns (axes permuted, sizes before, length, sizes after the flattened axes)."""
        axes = tuple(a % len(shape) for a in self.axis)
        kept = [a for a in range(len(shape)) if a not in axes]
        before = [a for a in kept if a < min(axes)]
        after = [a for a in kept if a > min(axes)]
        sizes = [[shape[a] for a in part] for part in (before, axes, after)]
        return (*before, *axes, *after), sizes[0], math.prod(sizes[1]), sizes[2]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Cuts an array into two-dimensional blocks: first along some axes, then along others.

    Attributes:
        columns: how the array is cut first.
        rows: how what `columns` makes of it is cut.
    """

    columns: Blocks
    rows: Blocks

    def split(self, x: jax.Array) -> jax.Array:
        """Returns x with both sets of axes replaced by (blocks, size)."""
        return self.rows.split(self.columns.split(x))

    def merge(self, v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Undoes `split` of an array of that shape; drops the filling."""
        return self.columns.merge(self.rows.merge(v, self.columns.split_shape(shape)), shape)

    def split_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of `split` of an array of that shape."""
        return self.rows.split_shape(self.columns.split_shape(shape))

    def inner_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of `split` that run inside a block, for an array of `ndim` axes."""
        between = ndim - len(self.columns.axis) + 2
        row = self.rows.inner_axis(between)
        kept = [a for a in range(between) if a - between not in self.rows.axis]
        column = kept.index(self.columns.inner_axis(ndim))
        return tuple(sorted((row, column if column < row - 1 else column + 2)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """An array stored as codes of a number format and scales. Made by `Quantizer.quantize`.

    A pytree with the leaves `packed`, `scale` and, where there are any, `packed_zero_point` and
    `global_scale`.
    Leading axes that the scales keep too may be sliced off all leaves (scan) or added (vmap).

    Attributes:
        packed: the codes; uint8 packed along the last axis below 8 bits, else their own dtype.
        scale: broadcasts to the array, or to `blocks.split` of it; float32, or as the format
            stores it: uint8 exponents (MX, bias 127), float8_e4m3fn (NVFP4).
        packed_zero_point: zero points packed like the codes, or None; shaped like `scale`.
        format: the number format.
        dtype: of the array this stands for.
        last: size of its last axis, which packing hides.
        blocks: how the array is cut into groups; None without groups.
        global_scale: float32, one for the array, of formats with two levels of scales; or None.
    """

    packed: jax.Array
    scale: jax.Array
    packed_zero_point: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    last: int = dataclasses.field(metadata={"static": True})
    blocks: Blocks | Tiles | None = dataclasses.field(default=None, metadata={"static": True})
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
    ) -> "QTensor":
        """Packs codes in the layout of the array.

        Args:
            codes: of the dtype of the format, at least one axis.
            scale: broadcasts to the codes, or to `blocks.split` of them; float32, or of the
                `scale_dtype` of the format.
            zero_point: integers in the range of the format, shaped like `scale`, or None.
            format: the number format or its name.
            dtype: of the array.
            blocks: how the scales are laid out, if not along whole axes.
            global_scale: float32, multiplies all scales, or None.

        Example:
            >>> import jax.numpy as jnp, jaxcompress as jc
            >>> codes = jnp.array([[1, -7], [3, 2]], jnp.int8)
            >>> q = jc.QTensor.from_codes(codes, jnp.ones((1, 1)), format="int4", dtype="float32")
            >>> q.nbytes, q.shape
            (6, (2, 2))
        """
        fmt = formats.get(format)
        if zero_point is not None:
            zero_point = fmt.pack(zero_point.astype(fmt.dtype))
        packed, last = fmt.pack(codes), codes.shape[-1]
        dtype = jnp.dtype(dtype)
        return cls(packed, scale, zero_point, fmt, dtype, last, blocks, global_scale)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], self.last)

    @property
    def ndim(self) -> int:
        return len(self.packed.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: packed codes, scales, zero points, global scale."""
        return nbytes(self)

    @property
    def codes(self) -> jax.Array:
        """The codes, of the dtype of the format, in the shape of the array."""
        return self.format.unpack(self.packed, self.last)

    @property
    def zero_point(self) -> jax.Array | None:
        """The zero points, of the dtype of the format, in the shape of `scale`; or None."""
        if self.packed_zero_point is None:
            return None
        return self.format.unpack(self.packed_zero_point, self.scale.shape[-1])

    def dequantize(self) -> jax.Array:
        """Returns the array, (codes - zero_point) * scale in float32, cast to `dtype`.

        With a global scale the scale is `scale * global_scale`.

        Example:
            >>> import jax.numpy as jnp, jaxcompress as jc
            >>> jc.Quantizer("int4").quantize(jnp.array([[7.0], [-2.2]]), axis=0).dequantize()
            Array([[ 7.],
                   [-2.]], dtype=float32)
        """
        codes = self.codes if self.blocks is None else self.blocks.split(self.codes)
        x = self.format.from_codes(codes)
        if (zero_point := self.zero_point) is not None:
            x = x - zero_point.astype(jnp.float32)
        x = multiply(x, self.format.factors(self.scale, self.global_scale))
        if self.blocks is not None:
            x = self.blocks.merge(x, self.shape)
        return x.astype(self.dtype)


def nbytes(tree: Any) -> int:
    """Returns the bytes that the arrays of a pytree take in storage.

    Sub-byte dtypes count packed, 8 // bits values to a byte. Whatever a QTensor stores is a leaf
    of it, so its packed codes, scales and zero points are counted and nothing else.

    Args:
        tree: of arrays, QTensors or `jax.ShapeDtypeStruct`s.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> jc.nbytes({"w": jnp.zeros((3, 5), jnp.bfloat16), "b": jnp.zeros(3, jnp.int4)})
        32
    """
    return sum(-(-math.prod(np.shape(a)) * _bits(a) // 8) for a in jax.tree.leaves(tree))


def _bits(leaf: Any) -> int:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return dtype.itemsize * 8
