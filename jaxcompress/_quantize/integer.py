# SPDX-License-Identifier: Apache-2.0
"""Sites in integers: the forward pass is a product of int8, derivatives are straight-through.

    y  = s_l s_r sum q_l q_r                    the product that is served, exact up to the scales
    dy = sum dl^ r^ + sum l^ dr^                of the decoded codes, as of float fake quantization

dl^ and dr^ are the tangents of the rounded operands, whatever their range: each operand comes as
codes, which have the numbers, and as an array that has the derivative, whose numbers nothing reads.
Another transform finds the float product of the decoded codes beside the one in integers
(`_core/analyze.py`) and puts it in its place; else it is never computed.

What is kept for the backward pass are codes, one byte a value. A code has no derivative, so that a
second derivative needs `residuals="float"`, and raises with codes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

from .._core.analysis import INTEGER
from .._core.qtensor import is_qtensor
from .._core.sites import Site
from .._errors import SiteError
from . import flat
from .integer_dot import Codes, Conv, Operation, longest, product, whole, widest
from .quantizer import Quantizer
from .straight_through import decoded

CHOICES = ("auto", True, False)
RESIDUALS = ("int8", "float")


class Rounded(NamedTuple):
    """An operand that was rounded.

    Attributes:
      value: it has the derivative; with codes its own numbers may be those before rounding.
      codes: the rounded numbers in integers; None if they are those of `value`.
    """

    value: Any
    codes: Codes | None = None

    @property
    def array(self) -> Any:
        """The rounded numbers with the derivative, as the float product reads them."""
        if self.codes is None or is_qtensor(self.value):
            return self.value
        return decoded(self.value, self.codes)


class Spec(NamedTuple):
    """What is computed at a site in integers. Hashable: sites of one kind are traced once.

    Attributes:
      op: the product.
      params: parameters of the float operation, sorted.
      integers: whether it is computed in integers; else in floats, laid out well.
      residuals: what is kept for the backward pass, `"int8"` or `"float"`.
    """

    op: Operation
    params: tuple
    integers: bool = True
    residuals: str = "int8"

    def plain(self, lhs: Any, rhs: Any) -> Any:
        """The float operation as it was written."""
        conv = isinstance(self.op, Conv)
        primitive = lax.conv_general_dilated_p if conv else lax.dot_general_p
        return primitive.bind(lhs, rhs, **dict(self.params))

    def of_left(self, dl: Any, r: Any) -> Any:
        """The float operation, linear in dl, laid out for the gradient of the left operand."""
        if isinstance(self.op, Conv):
            return self.plain(dl, r)
        p = dict(self.params)
        return flat.dot(dl, r, self.op.numbers, p["precision"], p["preferred_element_type"])

    def of_right(self, l: Any, dr: Any) -> Any:  # noqa: E741
        """The float operation, linear in dr, laid out for the gradient of the right operand."""
        if isinstance(self.op, Conv):
            return self.plain(l, dr)
        p = dict(self.params)
        return flat.dot_for_right(
            l, dr, self.op.numbers, p["precision"], p["preferred_element_type"]
        )


def possible(op: Operation, site: Site, quantizers: Any) -> bool:
    """Whether formats, scales and sizes of a site allow its product in integers."""
    if not all(map(_integer, quantizers)):
        return False
    for i, (operand, q) in enumerate(zip(site.operands, quantizers, strict=True)):
        axis = site.contracting(i)
        if q.granularity.size or not set(axis) <= set(q.shared_axes(operand.shape, axis)):
            return False
    sizes = (widest(q.format, q.symmetric) for q in quantizers)
    terms = op.terms(*(o.shape for o in site.operands))
    return 0 < terms <= longest(*sizes)


def _integer(q: Quantizer | None) -> bool:
    return q is not None and whole(q.format) and q.range not in ("dorefa", "pact", "twn")


def run(spec: Spec, lhs: Rounded, rhs: Rounded) -> Any:
    """The product of a site as `spec` says, with the derivative of the float one."""
    return _jitted(lhs.value, rhs.value, lhs.codes, rhs.codes, spec)[0]


def _both(lv: Any, rv: Any, lc: Any, rc: Any, spec: Spec) -> tuple[Any, Any]:
    """(the product, the one that was written, for whoever puts it in its place)."""
    plain = spec.plain(Rounded(lv, lc).array, Rounded(rv, rc).array)
    return product(spec.op, lc, rc) if spec.integers else spec.of_left(lv, rv), plain


_both.__name__ = INTEGER
_product = jax.custom_jvp(_both, nondiff_argnums=(4,))


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _straight_through(spec, primals, tangents):
    lv, rv, lc, rc = primals
    dl, dr = (None if isinstance(t, SymbolicZero) else t for t in tangents[:2])
    y, plain = _product(*primals, spec)
    if not spec.integers or spec.residuals == "float":
        dy = _tangent(spec, Rounded(lv, lc).array, Rounded(rv, rc).array, dl, dr)
    else:
        kept = _once(lv, rv, lc, rc)

        # A checkpoint keeps its inputs, codes and scales, and decodes them where they are used:
        # its barrier is what keeps XLA from computing them again from floats, and too early.
        @jax.checkpoint
        def of_codes(lc, rc, dl, dr):
            return _tangent(spec, lc.decode(lv.dtype), rc.decode(rv.dtype), dl, dr)

        dy = of_codes(*kept, dl, dr)
    return (y, plain), (dy, lax.full_like(plain, 0))


def _tangent(spec: Spec, l: Any, r: Any, dl: Any, dr: Any) -> Any:  # noqa: E741
    parts = [] if dl is None else [spec.of_left(dl, r)]
    parts += [] if dr is None else [spec.of_right(l, dr)]
    return functools.reduce(lax.add, parts)


@jax.custom_jvp
def _once(lv: Any, rv: Any, lc: Codes, rc: Codes) -> tuple[Codes, Codes]:
    """The codes, which stand for values that can be differentiated once only."""
    return lc, rc


@_once.defjvp
def _again(primals, tangents):
    raise SiteError(
        "a second derivative goes through a site that keeps int8 codes for its backward pass, and "
        'codes have no derivative. Use jaxcompress.quantize_aware(..., residuals="float"), or '
        "integer=False."
    )


_jitted = jax.jit(_product, static_argnums=(4,))
