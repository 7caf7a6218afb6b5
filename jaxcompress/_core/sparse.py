# SPDX-License-Identifier: Apache-2.0
"""`SparseTensor`: a pytree node that stands for an array with zeros and stores the rest of it.

Two layouts. A bit mask of the array and its values in row-major order; or N of every M values along
one axis, and where in its group each of them lies.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from .. import formats
from .._errors import FormatError
from . import _compat
from .qtensor import QTensor, Stored, dequantized, nbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseTensor(Stored):
    """An array stored as the values that are not zero and where they lie.

    Made by `SparseTensor.of`. A pytree with the leaves `values` and `index`. Inside a function that
    a transform changes (`jc.with_qtensors`, `jc.quantize_aware`) it is an array, computed there.

    Attributes:
      values: with a bit mask [count]; with N:M the shape of the array, N for M along `axis`. An
        array, or a QTensor.
      index: uint8: the mask, one bit for each value of the flat array; or the places in the
        groups, 0 ... M-1, in log2(M) bits each, packed along the last axis.
      shape: of the array.
      pattern: (N, M), or None for a bit mask.
      axis: along which the groups lie, negative.
    """

    values: Any
    index: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    pattern: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    axis: int = dataclasses.field(default=-2, metadata={"static": True})

    @classmethod
    def of(
        cls,
        x: Any,
        mask: Any = None,
        *,
        pattern: tuple[int, int] | None = None,
        axis: int = -2,
        quantize: Callable[[jax.Array], QTensor] | None = None,
    ) -> SparseTensor:
        """Stores an array without its zeros.

        Args:
          x: floating-point array of at least one axis.
          mask: bool array of its shape, what is kept; what is not zero, if left out. Not traced
            (inside jit) unless there is a pattern.
          pattern: (N, M): every M consecutive values along `axis` have at most N that are kept.
          axis: as above.
          quantize: what the values are stored as: with a pattern an array like x with a shorter
            axis, `lambda v: jc.Quantizer("int8").quantize(v, axis=-2)`.

        Raises:
          FormatError: a mask of another shape, or groups of which more than N are kept.

        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> x = jnp.array([[0.0], [3.0], [0.0], [5.0]])
        >>> s = jc.SparseTensor.of(x, pattern=(2, 4))
        >>> s.values.ravel().tolist(), s.nbytes, s.dequantize().ravel().tolist()
        ([3.0, 5.0], 10, [0.0, 3.0, 0.0, 5.0])
        """
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating) or not x.ndim:
            raise FormatError(f"SparseTensor of {x.dtype}{list(x.shape)}: expected floats.")
        mask = x != 0 if mask is None else jnp.asarray(mask)
        if mask.shape != x.shape or mask.dtype != bool:
            raise FormatError(
                f"SparseTensor of {list(x.shape)}: the mask is {mask.dtype}{list(mask.shape)}."
            )
        x = jnp.where(mask, x, jnp.zeros((), x.dtype))
        if pattern is None:
            if isinstance(mask, _compat.Tracer):
                raise FormatError(
                    "SparseTensor with a bit mask inside of jit: how many values there are would "
                    "have to be known. Make it outside, or give a pattern (N, M)."
                )
            values = x[mask]
            index = formats.pack(mask.reshape(-1).astype(jnp.uint8), 1)
            return cls(values if quantize is None else quantize(values), index, x.shape)
        n, m = _checked(pattern, x.shape, axis)
        axis = axis % x.ndim - x.ndim
        kept = _grouped(mask, m, axis)
        count = jnp.sum(kept, axis=-1)
        if not isinstance(count, _compat.Tracer) and int(count.max(initial=0)) > n:
            raise FormatError(
                f"SparseTensor of {list(x.shape)}, {n}:{m} along axis {axis}: a group has "
                f"{int(count.max())} values that are not zero. Prune it with jc.prune.nm({n}, {m}) "
                "along this axis, or leave the pattern out."
            )
        # Those that are kept come first; argsort is stable.
        places = jnp.sort(jnp.argsort(~kept, axis=-1, stable=True)[..., :n], axis=-1)
        values = jnp.take_along_axis(_grouped(x, m, axis), places, axis=-1)
        values = _merged(values, axis)
        index = formats.pack(_merged(places, axis).astype(jnp.uint8), _bits(m))
        return cls(values if quantize is None else quantize(values), index, x.shape, (n, m), axis)

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, and mask or places."""
        return nbytes(self)

    @property
    def layout(self) -> str:
        """In words: `2:4 of int8`, `bit mask of float32`."""
        what = self.values.format.name if isinstance(self.values, QTensor) else str(self.dtype)
        return f"{'bit mask' if self.pattern is None else '{}:{}'.format(*self.pattern)} of {what}"

    def dequantize(self) -> jax.Array:
        """The array, zeros and all."""
        return self._placed(dequantized(self.values))

    def opened(self) -> jax.Array | QTensor:
        """The array, as a QTensor if its values are integers whose scales hold for all of it."""
        q = self.values
        plain = self.pattern is not None and isinstance(q, QTensor) and q.blocks is None
        if not plain or q.packed_zero_point is not None or not q.format.name.startswith("int"):
            return self.dequantize()
        if q.scale.ndim != q.ndim or q.scale.shape[self.axis] != 1:
            return self.dequantize()
        codes = self._placed(q.codes)  # 0 is the code of 0
        return QTensor.from_codes(codes, q.scale, format=q.format, dtype=q.dtype, axis=q.axis)

    def _placed(self, values: jax.Array) -> jax.Array:
        """An array of the whole shape with these values, and zeros."""
        zero = jnp.zeros((), values.dtype)
        if self.pattern is None:
            mask = formats.unpack(self.index, 1, self.size, jnp.uint8).astype(bool)
            if not values.size:
                return jnp.zeros(self.shape, values.dtype)
            place = jnp.cumsum(mask, dtype=jnp.int32) - 1
            return jnp.where(mask, values[jnp.maximum(place, 0)], zero).reshape(self.shape)
        n, m = self.pattern
        places = formats.unpack(self.index, _bits(m), values.shape[-1], jnp.uint8)
        values, places = _grouped(values, n, self.axis), _grouped(places, n, self.axis)
        hit = places[..., None] == jnp.arange(m, dtype=jnp.uint8).reshape((1,) * places.ndim + (m,))
        x = jnp.sum(jnp.where(hit, values[..., None], zero), axis=-2, dtype=values.dtype)
        return _merged(x, self.axis)

    def __matmul__(self, other: Any) -> jax.Array:
        return self.dequantize() @ other

    def __rmatmul__(self, other: Any) -> jax.Array:
        return other @ self.dequantize()


def _checked(pattern: tuple[int, int], shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    n, m = pattern
    if not 0 < n <= m <= 256 or not -len(shape) <= axis < len(shape) or shape[axis] % m:
        raise FormatError(
            f"SparseTensor of {list(shape)}: {n}:{m} along axis {axis} does not fit. 0 < N <= M <= "
            "256, and M divides the axis."
        )
    return n, m


def _bits(m: int) -> int:
    return max(1, (m - 1).bit_length())


def _grouped(x: jax.Array, m: int, axis: int) -> jax.Array:
    """[..., n m along axis, ...] -> [..., n, ..., m]: the groups last."""
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], x.shape[axis] // m, m, *x.shape[axis + 1 :])
    return jnp.moveaxis(split, axis + 1, -1)


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """Undoes `_grouped`; `axis` is that of the result."""
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, -1, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def is_sparse(x: Any) -> bool:
    return isinstance(x, SparseTensor)


def _to_json(static: tuple) -> bytes:
    return json.dumps(static).encode()


def _from_json(text: bytes | bytearray) -> tuple:
    shape, pattern, axis = json.loads(bytes(text))
    return tuple(shape), None if pattern is None else tuple(pattern), axis


jax.export.register_pytree_node_serialization(
    SparseTensor,
    serialized_name="jaxcompress.SparseTensor",
    serialize_auxdata=_to_json,
    deserialize_auxdata=_from_json,
)
