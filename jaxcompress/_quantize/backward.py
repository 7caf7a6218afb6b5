# SPDX-License-Identifier: Apache-2.0
"""Quantized backward passes: both products that carry a gradient through a site in few bits.

    y  = op(x, w)              forward as it is, on what the forward formats made of x and w
    dx = op^T(q1(dy), q(w))    sums over the outputs of w: all of them share a scale in q1 and q
    dw = op^T(q2(dy), q(x))    sums over the rows of x: all of them share a scale in q2 and q

Values that one result sums over share a scale, so that each product could run in the format and
be scaled afterwards. dy is therefore rounded twice, and x and w are rounded anew: the scales of
the forward pass lie along another axis. `q` has the format that goes with that of the gradient
(`companion`). Rounding of dy may be stochastic: then the expectation of both products over keys
is that of the unrounded dy.

Banner et al. 2018, Scalable Methods for 8-bit Training, section 4; Micikevicius et al. 2022, FP8
Formats for Deep Learning, section 3 (E5M2 for gradients, E4M3 else); Gupta et al. 2015.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import formats
from .._core import _compat
from .._core.sites import Operand, Site
from .._errors import FormatError, RecipeError, SiteError
from . import integer
from .integer import Rounded, Spec
from .quantizer import Quantizer

_KINDS = (formats.Integer, formats.Minifloat, formats.BFloat16, formats.MX, formats.NVFP4)
_WIDER = {"float8_e5m2": "float8_e4m3fn", "mxfp8_e5m2": "mxfp8_e4m3"}


def checked(quantizer: Quantizer, pattern: str) -> Quantizer:
    """The quantizer of the gradient of a rule.

    Raises:
      RecipeError: a range that is stored or learned, or a format without negative numbers.
    """
    if quantizer.special:
        raise RecipeError(
            f"gradient of rule {pattern!r}: range={quantizer.range!r} is kept from step to step, "
            'and nothing keeps one of a gradient. Use range="absmax".'
        )
    if quantizer.format.min >= 0 or not isinstance(quantizer.format, _KINDS):
        raise RecipeError(
            f"gradient of rule {pattern!r}: {quantizer.format.name} is no format for gradients. "
            'Use a signed integer or a float, such as "int8" or "float8_e5m2".'
        )
    return quantizer


def companion(gradient: Quantizer) -> Quantizer:
    """The quantizer of what a quantized gradient is multiplied with.

    The format of the gradient, but E4M3 with E5M2; to nearest; the same granularity.

    >>> companion(Quantizer("float8_e5m2", "token", rounding="stochastic")).format.name
    'float8_e4m3fn'
    """
    fmt = gradient.format
    return Quantizer(
        _WIDER.get(fmt.name, fmt), gradient.granularity, indivisible=gradient.indivisible
    )


@dataclasses.dataclass(frozen=True)
class Product:
    """The product that makes the gradient of one operand of a site.

    Attributes:
      other: position of the operand that it reads.
      gradient: axes of the cotangent that it sums over.
      operand: axes of the other operand that it sums over, in the same order.
    """

    other: int
    gradient: tuple[int, ...]
    operand: tuple[int, ...]


def products(site: Site) -> tuple[Product, ...] | None:
    """The backward products of a site, one for each operand; None if it has none (a lookup).

    Where a product sums over nothing (the outer product of two vectors), values share the scale
    that the sum would: else each had one of its own, and nothing would be rounded.

    Raises:
      SiteError: a ragged matmul of a kind that is not handled.
    """
    if site.op == "gather":
        return None
    if site.op == "conv_general_dilated":
        # Windows overlap: what is summed with a kernel is shared by all positions of an example,
        # and positions of the kernel by all of its outputs.
        numbers = site.params["dimension_numbers"]
        lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
        return (
            Product(1, tuple(out[1:]), (rhs[0], *rhs[2:])),
            Product(0, (out[0], *out[2:]), (lhs[0], *lhs[2:])),
        )
    (summed, batch), groups = _dot_numbers(site)
    kept = [
        [d for d in range(len(o.shape)) if d not in (*summed[i], *batch[i])]
        for i, o in enumerate(site.operands)
    ]
    kept[1] = [d for d in kept[1] if d not in groups]
    start, middle = len(batch[0]), len(batch[0]) + len(kept[0])
    places = (tuple(range(start, middle)), tuple(range(middle, middle + len(kept[1]))))
    every = places[0] + places[1]
    return tuple(
        Product(1 - i, places[1 - i] or every, tuple(kept[1 - i]) or tuple(summed[1 - i]))
        for i in range(2)
    )


def _dot_numbers(site: Site) -> tuple[Any, tuple[int, ...]]:
    if site.op == "dot_general":
        return site.params["dimension_numbers"], ()
    ragged = site.params["ragged_dot_dimension_numbers"]
    numbers = ragged.dot_dimension_numbers
    (summed, _), (batch, _) = numbers
    if set(ragged.lhs_ragged_dimensions) & {*summed, *batch}:
        raise SiteError(
            f"`{site.name}` ({site.op}, {site.source}) has groups along an axis that it sums over "
            "or a batch axis: its backward pass cannot be quantized. Give the site a rule "
            "without gradient=."
        )
    return numbers, tuple(ragged.rhs_group_dimensions)


def fits(site: Site, gradient: Quantizer) -> None:
    """Raises SiteError where a quantizer of gradients does not fit the products of a site."""
    cotangent, rest = site.out_avals[0].shape, companion(gradient)
    for product in products(site) or ():
        shape = site.operands[product.other].shape
        try:
            gradient.check(cotangent, product.gradient)
            rest.check(shape, product.operand)
        except FormatError as e:
            raise SiteError(
                f"gradient {gradient.format.name} per {gradient.granularity} does not fit "
                f"`{site.name}` ({site.op} {[list(o.shape) for o in site.operands]}): {e} Or give "
                "the site a rule without gradient=."
            ) from None


def with_backward(
    site: Site,
    bind: Any,
    operands: Sequence[Rounded],
    gradient: Quantizer,
    key: Any,
    spec: Spec | None = None,
) -> Any:
    """The operation on these operands, with its two backward products quantized.

    Differentiable in reverse mode only: a `custom_vjp`.

    Args:
      site: a site that has `products`.
      bind: its operation (`_core.interpret.Operation`).
      operands: as the forward pass reads them; their own quantizers are outside.
      gradient: quantizer of the cotangent.
      key: random key of the site, for stochastic rounding; else None.
      spec: how the forward pass is computed in integers, or None.
    """
    known = products(site)
    assert known is not None
    axes = _cotangent_like(site)

    def rounded(quantizer: Quantizer, operand: Operand, x: jax.Array, axis: tuple, key: Any = None):
        sync = operand.split_over(quantizer.shared_axes(x.shape, axis))
        return quantizer.fake_quantize(x, axis, sync=sync, key=key)

    @jax.custom_vjp
    def op(operands: tuple, codes: tuple, rest: tuple, key: Any) -> Any:
        if spec is not None:
            return integer.run(spec, *map(Rounded, operands, codes))
        return bind._replace(rest=rest)(*operands)

    def forward(operands: tuple, codes: tuple, rest: tuple, key: Any) -> Any:
        if gradient.rounding == "stochastic" and key is None:
            raise RecipeError(
                f"the gradient of `{site.name}` is rounded at random, and there is no key: call "
                "the function that jaxcompress.quantize_aware returned with "
                "quantize_key=jax.random.key(...), a new one at every step."
            )
        return op(operands, codes, rest, key), (operands, rest, key)

    def backward(saved: Any, g: jax.Array) -> tuple:
        operands, rest, key = saved
        key = _mixed(key, g) if gradient.rounding == "stochastic" else None
        grads = []
        for i, product in enumerate(known):
            j = product.other
            other = rounded(companion(gradient), site.operands[j], operands[j], product.operand)
            dy = rounded(gradient, axes, g, product.gradient, key)

            def linear(v: jax.Array, i=i, other=other) -> Any:
                pair = (v, other) if i == 0 else (other, v)
                return bind._replace(rest=rest)(*pair)

            grads += jax.linear_transpose(linear, operands[i])(dy)
        return tuple(grads), None, None, None

    op.defvjp(forward, backward)
    values, codes = tuple(x.array for x in operands), tuple(x.codes for x in operands)
    return op(values, codes if spec is not None else (), bind.rest, key)


def _mixed(key: Any, g: jax.Array) -> Any:
    """The key of a site for one cotangent, from the key of the site and the cotangent's bits.

    A site has one key in a step, and is run many times in it: by the steps of a scan over time,
    by microbatches, by the examples under `vmap`, on every device. If all of them drew the same
    noise, their errors would not average out. They differ in their data, which every one of them
    has at hand, where a counter would have to be carried through whatever the caller wrote. The
    result is a function of key and data, and for any data the noise is uniform over keys. A plain
    sum of bits would not tell permutations apart, hence the odd factors.
    """
    g = lax.stop_gradient(g)
    width = jnp.dtype(g.dtype).itemsize * 8
    bits = lax.bitcast_convert_type(g, f"uint{min(width, 32)}").astype(jnp.uint32).ravel()
    factors = lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B2) + jnp.uint32(1)
    mixed = jnp.sum(bits * factors, dtype=jnp.uint32)
    if axes := _compat.varying_axes(mixed) - _compat.varying_axes(key):
        key = lax.pcast(key, tuple(sorted(axes)), to="varying")
    return jax.random.fold_in(key, mixed)


def _cotangent_like(site: Site) -> Operand:
    """The cotangent as an operand: which mesh axes split its dimensions."""
    shape, dtype = site.out_avals[0].shape, site.out_avals[0].dtype
    lhs, rhs = (o.manual for o in site.operands)
    if lhs is None or rhs is None:
        return Operand("gradient", "", shape, dtype)
    if site.op == "conv_general_dilated":
        numbers = site.params["dimension_numbers"]
        manual = [frozenset()] * len(shape)
        for a, b in zip(numbers.out_spec, numbers.lhs_spec, strict=True):
            manual[a] = lhs[b]
        manual[numbers.out_spec[1]] = rhs[numbers.rhs_spec[0]]
        return Operand("gradient", "", shape, dtype, manual=tuple(manual))
    (summed, batch), groups = _dot_numbers(site)
    gone = [{*summed[i], *batch[i], *((), groups)[i]} for i in range(2)]
    split = [lhs[a] | rhs[b] for a, b in zip(*batch, strict=True)]
    split += [axes for d, axes in enumerate(lhs) if d not in gone[0]]
    split += [axes for d, axes in enumerate(rhs) if d not in gone[1]]
    return Operand("gradient", "", shape, dtype, manual=tuple(split))
