# SPDX-License-Identifier: Apache-2.0
"""Matrix products of an array with a large QTensor on a CPU, without its float array.

XLA does not fuse the unpacking of a weight into a matrix product on CPUs: it writes the whole float
weight first, which takes longer than the product of a few rows. Here a loop takes it apart, in the
order in which its codes lie:

    y[:, n] = x w[n, :]^T         codes lie along the sum: a block of output channels at a time
    y = sum_i x[:, i] w[i, :]     along channels, up to 16 rows of x (4 with fp8): eight terms at a
                                  time, unpacked and added up in one pass, never written in floats
    y[:, n] = x w[:, n]           along channels, more rows: a block of output channels at a time

The sum is one of float32; only its order is another. `benchmarks/integer.py` measures. What other
platforms multiply is the unpacked weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from ..formats import Format
from ..formats._minifloat import Minifloat
from . import _compat, qmove, qpick
from .analysis import INTEGER
from .blocks import Blocks
from .qtensor import QTensor, is_qtensor

_SMALLEST = 2**18  # values of a weight: less is not worth a loop
_FEW, _EACH = 16, 2**16  # rows of x, and values of a weight for each
_TERMS = 8  # of one pass: XLA no longer makes vectors of twice as many
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_CHANNELS = {False: (512, 256), True: (64,)}  # of a block; True: few rows, codes along the sum


class Product(NamedTuple):
    """A `dot_general` of an array and a QTensor. Hashable: products of one kind are traced once.

    Attributes:
        params: its parameters, sorted.
        side: which operand is the QTensor.
    """

    params: tuple
    side: int

    def plain(self, q: Any, x: Any) -> jax.Array:
        """The product of arrays."""
        q = q.dequantize() if is_qtensor(q) else q
        return lax.dot_general_p.bind(*((x, q) if self.side else (q, x)), **dict(self.params))

    def fast(self, q: QTensor, x: jax.Array) -> jax.Array | None:
        """The same in a loop; None if the codes of q do not lie as one needs them."""
        summed = dict(self.params)["dimension_numbers"][0]
        inner, outer = summed[self.side], summed[1 - self.side]
        free = [d for d in range(q.ndim) if d not in inner]
        kept = [d for d in range(x.ndim) if d not in outer]
        channels, own = [q.shape[d] for d in free], [x.shape[d] for d in kept]
        matrix, m = _as_matrix(q, inner, free), math.prod(own)
        k = math.prod(q.shape[d] for d in inner)
        if matrix is None:
            return None
        rows = lax.reshape(lax.transpose(x, (*kept, *outer)), (m, k))
        y = _matmul(_in_bytes(matrix[0]), matrix[1], rows)
        if self.side:
            return lax.reshape(y, (*own, *channels))
        return lax.reshape(lax.transpose(y, (1, 0)), (*channels, *own))


def dot_general(lhs: Any, rhs: Any, **params: Any) -> list | None:
    """The product, in a loop where it is lowered for a CPU; None if one is not worth it.

    Args:
        lhs: array or QTensor.
        rhs: array or QTensor.
        params: parameters of the primitive.
    """
    side = 1 if is_qtensor(rhs) else 0
    q, x = (rhs, lhs) if side else (lhs, rhs)
    summed, batch = params["dimension_numbers"]
    if is_qtensor(x) or batch[side] or q.size < _SMALLEST or len(summed[side]) in (0, q.ndim):
        return None
    if 0 in x.shape or x.dtype not in _DTYPES:
        return None
    if any(any(jax.typeof(a).sharding.spec) for a in (x, q.packed)):
        return None  # a mesh with explicit axes splits it
    return [_jitted(q, x, Product(tuple(sorted(params.items())), side))[0]]


# ---------------------------------------------------------------------- loops over matrices


def _as_matrix(q: QTensor, summed: Any, free: Any) -> tuple[QTensor, bool] | None:
    """(q as a matrix in the order in which its codes lie, whether they lie along the sum)."""
    if q.ndim == 2 and q.axis == -2:
        q, summed = qmove.transpose(q, (1, 0)), [1 - d for d in summed]  # type: ignore[assignment]
        free = [1 - d for d in free]
    order = tuple(range(q.ndim))
    along = order == (*free, *summed)
    if q.axis != -1 or not (along or order == (*summed, *free)):
        return None
    shape = [math.prod(q.shape[d] for d in dims) for dims in (summed, free)]
    matrix = q if q.ndim == 2 else qmove.reshape(q, shape[::-1] if along else shape)
    return None if matrix is None or matrix.axis != -1 else (matrix, along)


def _fp8(fmt: Format) -> Minifloat | None:
    """What the elements of a format are, if it is fp8."""
    element = getattr(fmt, "element", fmt)
    return element if isinstance(element, Minifloat) and element.code_bits == 8 else None


def _in_bytes(q: QTensor) -> QTensor:
    """The same numbers with codes of fp8 as bytes: taking their bits apart is several times faster
    than the casts of XLA on CPUs, which are no vector code."""
    fmt, dtype = q.format, np.dtype(np.uint8)
    element = _fp8(fmt)
    if element is None:
        return q
    bits = dataclasses.replace(element, dtype=dtype)
    if fmt is not element:
        bits = dataclasses.replace(fmt, element=bits, dtype=dtype)
    packed = lax.bitcast_convert_type(q.packed, jnp.uint8)
    return dataclasses.replace(q, format=bits, packed=packed)


def _matmul(q: QTensor, along: bool, x: jax.Array) -> jax.Array:
    """float32, x [m, k] times q: [n, k] if its codes lie along the sum, else [k, n].

    The examples of `jax.vmap` are more rows, for which another loop may be the faster.
    """

    def unpacked(q: QTensor, x: jax.Array) -> jax.Array:
        w = (q.T if along else q).dequantize()
        return lax.dot(x, w, preferred_element_type=jnp.float32)

    product = custom_vmap(_loop(q, along, x.shape[0]) or unpacked)

    @product.def_vmap
    def _(size: int, batched: Any, q: QTensor, x: jax.Array) -> tuple[jax.Array, bool]:
        if any(jax.tree.leaves(batched[0])):
            axes = jax.tree.map(lambda b: 0 if b else None, batched)
            return jax.vmap(unpacked, axes)(q, x), True
        y = _matmul(q, along, lax.reshape(x, (size * x.shape[1], x.shape[2])))
        return lax.reshape(y, (size, x.shape[1], y.shape[1])), True

    return product(q, x)


def _loop(q: QTensor, along: bool, rows: Any) -> Callable | None:
    """The loop for so many rows, which may be a symbol of `jax.export`."""
    n, cut = q.shape[0 if along else 1], q.blocks
    rows = rows if isinstance(rows, int) else math.inf
    few = _FEW if _fp8(q.format) is None else _FEW // 4  # a row takes all codes apart again
    if not along and rows <= min(few, q.size // _EACH):
        k, found, lead = q.shape[0], 0, ()
        if cut is None:
            found, lead = k, (1,)
        elif isinstance(cut, Blocks) and cut.axis == (-2,) and k % cut.size == 0:
            found, lead = cut.size, (k // cut.size, 1)
        plain = q.global_scale is None or not q.global_scale.ndim
        if found and found % _TERMS == 0 and q.scale.shape[:-1] == lead and plain:
            return functools.partial(_by_terms, size=found)
    for size in _CHANNELS[along and rows <= _FEW * 4]:
        if n % size == 0 and n >= 4 * size:
            if qpick.block(q, 0 if along else 1, 0, size) is not None:
                return functools.partial(_by_channels, along=along, size=size)
    return None


def _by_channels(q: QTensor, x: jax.Array, along: bool, size: int) -> jax.Array:
    """A block of output channels at a time."""
    axis = 0 if along else 1

    def one(i: jax.Array) -> jax.Array:
        w = qpick.block(q, axis, i, size).dequantize()  # type: ignore[union-attr]
        numbers = (((1,), (1 - axis,)), ((), ()))
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)

    y = lax.map(one, jnp.arange(q.shape[axis] // size))
    return lax.reshape(lax.transpose(y, (1, 0, 2)), (x.shape[0], q.shape[axis]))


def _by_terms(q: QTensor, x: jax.Array, size: int) -> jax.Array:
    """A few rows of q at a time, each times a number of x; `size` rows share scales."""
    (m, k), n = x.shape, q.shape[1]
    along_n, along_m = (
        functools.partial(lax.broadcast_in_dim, shape=(m, n), broadcast_dimensions=(d,))
        for d in range(2)
    )

    def group(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        rows, packed, scale, zero = part
        own = dataclasses.replace(q, scale=scale, packed_zero_point=zero, blocks=None)

        def step(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
            r, w = part[0], dataclasses.replace(own, packed=part[1]).dequantize()
            w = lax.convert_element_type(w, jnp.float32)
            products = (lax.mul(along_n(r[i]), along_m(w[i])) for i in range(_TERMS))
            return lax.add(total, functools.reduce(lax.add, products)), None

        return lax.scan(step, total, (rows, packed))[0], None

    rows = lax.transpose(lax.convert_element_type(x, jnp.float32), (1, 0))
    rows, packed = (
        lax.reshape(v, (k // size, size // _TERMS, _TERMS, v.shape[1])) for v in (rows, q.packed)
    )
    start = jnp.zeros((m, n), jnp.float32)
    axes = frozenset().union(*map(_compat.varying_axes, jax.tree.leaves((q, x))))
    start = lax.pcast(start, tuple(sorted(axes)), to="varying") if axes else start
    if q.blocks is None:
        return group(start, (rows[0], packed[0], q.scale, q.packed_zero_point))[0]
    return lax.scan(group, start, (rows, packed, q.scale, q.packed_zero_point))[0]


# ---------------------------------------------------------------------- derivatives


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def jaxcompress_integer(q: QTensor, x: jax.Array, spec: Product) -> tuple[jax.Array, jax.Array]:
    """(the product, that of the unpacked weight for whoever puts it in its place).

    Its name is `analysis.INTEGER`: that of all sites which are computed on codes.
    """

    def loop(q: QTensor, x: jax.Array) -> jax.Array:
        y = spec.fast(q, x)
        return spec.plain(q, x) if y is None else lax.convert_element_type(y, plain.dtype)

    plain = spec.plain(q, x)
    return lax.platform_dependent(q, x, cpu=loop, default=spec.plain), plain


@functools.partial(jaxcompress_integer.defjvp, symbolic_zeros=True)
def _derivative(spec: Product, primals: tuple, tangents: tuple) -> tuple:
    (q, x), (dq, dx) = primals, tangents
    y, plain = jaxcompress_integer(q, x, spec)
    dx = None if isinstance(dx, SymbolicZero) else dx
    leaves, tree = jax.tree.flatten(dq)
    fixed = all(isinstance(t, SymbolicZero) for t in leaves)

    # Keeps what is packed, and unpacks it where it is used.
    @jax.checkpoint
    def tangent(q: QTensor, x: jax.Array, leaves: Any, dx: Any) -> jax.Array:
        parts = [] if dx is None else [spec.plain(q, dx)]
        if leaves is not None:
            dw = jax.jvp(lambda q: q.dequantize(), (q,), (jax.tree.unflatten(tree, leaves),))[1]
            parts.append(spec.plain(dw, x))
        return functools.reduce(lax.add, parts)

    def known(t: Any) -> Any:
        if not isinstance(t, SymbolicZero):
            return t
        shape, dtype = t.aval.shape, t.aval.dtype  # type: ignore[attr-defined]
        zero = dtype if jnp.issubdtype(dtype, jnp.floating) else jax.dtypes.float0
        return np.zeros(shape, zero)

    dy = tangent(q, x, None if fixed else list(map(known, leaves)), dx)
    return (y, plain), (dy, lax.full_like(plain, 0))


assert jaxcompress_integer.__name__ == INTEGER
_jitted = jax.jit(jaxcompress_integer, static_argnums=(2,))
