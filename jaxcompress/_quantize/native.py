# SPDX-License-Identifier: Apache-2.0
"""Products of codes where a platform is fast at them: fp8, MX, NVFP4, packed integers in groups.

    y = s_l s_r sum q_l q_r                          fp8, scales of rows: a dot of the codes
    y = g_l g_r sum_b X_lb X_rb sum_i q_li q_ri      blocks along the sum: `lax.scaled_dot`
    y = s_l sum_b s_rb sum_i q_li q_ri               int8 times packed groups: `grouped_dot.py`

GPUs and TPUs multiply small floats themselves, CPUs run the products of int8. Elsewhere the rounded
floats are multiplied, as without this file. Which of the two a program holds is decided when it is
lowered (`lax.platform_dependent`); both are exact but for the order of the sums. The derivative is
straight-through, of the rounded floats, everywhere.

References: OFP8 (Micikevicius et al. 2022); OCP MX v1.0, section 6.2 (dot products).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from .. import formats
from .._core import _compat, qdot
from .._core.blocks import Blocks
from .._core.qtensor import QTensor, dequantized, is_qtensor
from .._core.sites import Site
from . import flat
from .grouped_dot import grouped_product, in_groups
from .integer import Spec
from .integer_dot import Dot, codes_of
from .quantizer import Quantizer
from .straight_through import quantize as packed

_PLATFORMS = ("cuda", "rocm", "tpu")
_GROUPS = ("cpu",)
_FP8, _FP4 = ("float8_e4m3fn", "float8_e5m2"), "float4_e2m1fn"


class Native(NamedTuple):
    """A product of codes. Hashable: sites of one kind are traced once.

    Attributes:
      params: parameters of the `dot_general`, sorted.
      dtype: name of the dtype of its result.
      groups: whether it is one of int8 and a packed weight in groups; else of small floats.
      otherwise: how the site is computed where its weight is not packed.
    """

    params: tuple
    dtype: str
    groups: bool = False
    otherwise: Spec | None = None

    @property
    def numbers(self) -> tuple:
        return dict(self.params)["dimension_numbers"]

    def takes(self, operands: Sequence) -> bool:
        """Whether operands are what it multiplies."""
        return not self.groups or (is_qtensor(operands[1]) and in_groups(operands[1]))

    def plain(self, lhs: Any, rhs: Any) -> Any:
        """The product of the floats, packed ones a block at a time where that saves memory."""
        params, out = dict(self.params), None
        if is_qtensor(lhs) or is_qtensor(rhs):
            out = qdot.dot_general(lhs, rhs, **params)
        return out[0] if out else lax.dot_general_p.bind(*map(dequantized, (lhs, rhs)), **params)


def possible(site: Site, quantizers: Sequence[Quantizer | None]) -> Native | None:
    """How the product of a site is computed on small floats; None if it is not."""
    if site.op != "dot_general" or site.params.get("out_sharding") is not None:
        return None
    dtype = site.out_avals[0].dtype
    kinds = []
    for i, (operand, q) in enumerate(zip(site.operands, quantizers, strict=True)):
        axis = site.contracting(i)
        if q is None or q.special or q.rounding != "half_even":
            return None
        if operand.split_over(q.shared_axes(operand.shape, axis)):
            return None  # one scale for the parts on several devices
        kinds.append(_kind(q, operand.shape, axis))
    if None in kinds or kinds[0] != kinds[1] or dtype not in (jnp.float32, jnp.bfloat16):
        return None
    return Native(tuple(sorted(site.params.items())), dtype.name)


def possible_in_groups(
    site: Site, quantizers: Sequence[Quantizer | None], otherwise: Spec
) -> Native | None:
    """How the product of int8 rows and a weight in groups is computed, if that is packed."""
    lhs, rhs = (*quantizers, None)[:2]
    if lhs is None or rhs is None or not rhs.granularity.size or not rhs.symmetric:
        return None
    if not all(isinstance(q.format, formats.Integer) and q.format.min < 0 for q in (lhs, rhs)):
        return None
    summed, batch = site.params["dimension_numbers"]
    shape, axis = site.operands[0].shape, site.contracting(0)
    rows = not lhs.granularity.size and {*axis} <= {*lhs.shared_axes(shape, axis)}
    if not rows or batch[0] or summed != ((len(shape) - 1,), (0,)):
        return None
    if lhs.special or lhs.rounding != "half_even" or not lhs.symmetric:
        return None
    if site.operands[0].split_over(range(len(shape))):
        return None
    dtype = site.out_avals[0].dtype.name
    return Native(tuple(sorted(site.params.items())), dtype, True, otherwise)


def _kind(q: Quantizer, shape: tuple[int, ...], axis: tuple[int, ...]) -> Any:
    """What two operands must have in common; None if no platform multiplies them."""
    fmt, group = q.format, q.granularity.size
    if isinstance(fmt, formats.MX | formats.NVFP4):
        blocks = len(axis) == 1 and group == fmt.block and shape[axis[0]] % fmt.block == 0
        known = blocks and q.granularity.rows is None and fmt.element.name in (*_FP8, _FP4)
        return fmt if known and _compat.SCALED_DOT else None
    rows = group is None and set(axis) <= set(q.shared_axes(shape, axis))
    return "rows" if rows and q.symmetric and fmt.name in _FP8 else None


def apply(
    spec: Native, site: Site, bind: Callable, operands: Sequence, quantizers: Sequence
) -> jax.Array:
    """The operation of a site, its operands rounded; packed weights already are."""
    pairs = [
        _rounded(x, q, site.contracting(i))
        for i, (x, q) in enumerate(zip(operands, quantizers, strict=True))
    ]
    (lhs, lq), (rhs, rq) = pairs
    arrays = [x for x in (lhs, rhs) if not is_qtensor(x)]
    if lq is None or rq is None or flat.split_by_mesh(arrays):
        return bind(lhs, rhs)
    return _jitted(lhs, rhs, lq, rq, spec)[0]


def _rounded(x: Any, quantizer: Quantizer, axis: tuple[int, ...]) -> tuple[Any, QTensor | None]:
    """(the rounded operand, the same packed, or None where it is packed in another way)."""
    if not is_qtensor(x):
        return quantizer.fake_quantize(x, axis), packed(lax.stop_gradient(x), None, quantizer, axis)
    same = x.format == quantizer.format and x.zero_point is None
    return x, x if same and x.scale.shape == quantizer.scale_shape(x.shape, axis) else None


def product(spec: Native, lhs: QTensor, rhs: QTensor) -> jax.Array:
    """The product of packed operands, computed on their codes.

    >>> import jax.numpy as jnp, jaxcompress as jc
    >>> q = jc.Quantizer("float8_e4m3fn").quantize(jnp.array([[1.0, 2.0]]), axis=1)
    >>> numbers = (((1,), (1,)), ((), ()))
    >>> product(Native((("dimension_numbers", numbers),), "float32"), q, q)
    Array([[5.]], dtype=float32)
    """
    sides, numbers = (lhs, rhs), spec.numbers
    if spec.groups:
        rows = codes_of(lhs)
        assert rows is not None
        return grouped_product(rows, rhs, spec.dtype)
    if lhs.blocks is None:
        y = lax.dot_general(lhs.codes, rhs.codes, numbers, preferred_element_type=jnp.float32)
        for i, q in enumerate(sides):
            y = y * Dot(numbers, spec.dtype).spread(q.scale, i, y.ndim)
    else:
        codes, scales = (
            [_matrix(f(q), numbers, i) for i, q in enumerate(sides)]
            for f in (_elements, _block_scales)
        )
        last = codes[0].ndim - 1
        lead = tuple(range(last - 1))
        y = lax.scaled_dot(
            *codes, lhs_scale=scales[0], rhs_scale=scales[1],
            dimension_numbers=(((last,), (last,)), (lead, lead)),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        kept = [_kept(q.ndim, numbers, i) for i, q in enumerate(sides)]
        shape = [q.shape[d] for q, dims in zip(sides, kept, strict=True) for d in dims]
        y = lax.reshape(y, [*(lhs.shape[d] for d in numbers[1][0]), *shape])
    for q in sides:
        y = y if q.global_scale is None else y * q.global_scale
    return lax.convert_element_type(y, spec.dtype)


def _kept(ndim: int, numbers: tuple, i: int) -> list[int]:
    """The dimensions of operand `i` that are neither summed over nor of the batch."""
    return [d for d in range(ndim) if d not in (*numbers[0][i], *numbers[1][i])]


def _elements(q: QTensor) -> jax.Array:
    """The codes in a dtype of floats."""
    if jnp.issubdtype(q.codes.dtype, jnp.floating):
        return q.codes
    return lax.bitcast_convert_type(q.codes.astype(jnp.uint4), jnp.float4_e2m1fn)


def _block_scales(q: QTensor) -> jax.Array:
    """Scales with one value for each block along its axis, in a dtype of floats."""
    assert isinstance(q.blocks, Blocks)
    s = lax.squeeze(q.scale, (q.blocks.axis[0] % q.ndim + 1,))
    return lax.bitcast_convert_type(s, jnp.float8_e8m0fnu) if s.dtype == jnp.uint8 else s


def _matrix(x: jax.Array, numbers: tuple, i: int) -> jax.Array:
    """Operand `i` as [free, summed], after one axis for all batch dimensions if there are any."""
    summed, batch = (tuple(pair[i]) for pair in numbers)
    free = _kept(x.ndim, numbers, i)
    groups = (batch, free, summed) if batch else (free, summed)
    shape = [math.prod(x.shape[d] for d in dims) for dims in groups]
    return lax.reshape(lax.transpose(x, (*batch, *free, *summed)), shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def jaxcompress_integer(
    lhs: Any, rhs: Any, lq: QTensor, rq: QTensor, spec: Native
) -> tuple[Any, Any]:
    """(the product, that of the floats for whoever puts it in its place).

    Its name is `_core.analysis.INTEGER`: that of all sites which are computed on codes.
    """

    def native(lhs: Any, rhs: Any, lq: QTensor, rq: QTensor) -> jax.Array:
        return product(spec, lq, rq)

    def plain(lhs: Any, rhs: Any, lq: QTensor, rq: QTensor) -> jax.Array:
        return spec.plain(lhs, rhs)

    chosen = dict.fromkeys(_GROUPS if spec.groups else _PLATFORMS, native)
    y = lax.platform_dependent(lhs, rhs, lq, rq, **chosen, default=plain)
    return y, spec.plain(lhs, rhs)


@functools.partial(jaxcompress_integer.defjvp, symbolic_zeros=True)
def _straight_through(spec, primals, tangents):
    values = [dequantized(x) for x in primals[:2]]
    known = [
        None if is_qtensor(x) or isinstance(t, SymbolicZero) else t
        for x, t in zip(primals[:2], tangents[:2], strict=True)
    ]
    y, plain = jaxcompress_integer(*primals, spec)
    dy = lax.full_like(plain, 0)
    if known[0] is not None:
        dy = spec.plain(known[0], values[1])
    if known[1] is not None:
        right = spec.plain(values[0], known[1])
        dy = right if known[0] is None else lax.add(dy, right)
    return (y, plain), (dy, lax.full_like(plain, 0))


_jitted = jax.jit(jaxcompress_integer, static_argnums=(4,))
