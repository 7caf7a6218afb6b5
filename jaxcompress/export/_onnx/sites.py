# SPDX-License-Identifier: Apache-2.0
"""The function as it is exported: at every quantized site, what its operands were decoded from.

Three primitives say it in the jaxpr. They are what the transform computes, and differ from it only
in that the exporter sees numbers, scales and zero points apart.

    jc_decode(numbers, scale, zero) = (numbers - zero) * scale
    jc_static(x, scale, zero) = jc_decode(clip(round(x / scale) + zero, low, high), scale, zero)

    jc_dynamic(x, scale)      the same with a scale that no value of x exceeds, without zero
    jc_measured(x, scale, zero)    the same in uint8 with the least and largest value of all of x

and of binary numbers, scale where x >= 0, else -scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ... import formats
from ..._core import _compat
from ..._core.qtensor import QTensor, is_qtensor
from ..._core.sites import Site
from ..._core.transform import Transformed, transformed_function
from ..._quantize import state as ranges
from ..._quantize import straight_through
from ..._quantize.at_site import rounded_operand
from ..._quantize.integer import possible
from ..._quantize.integer_dot import operation_of, whole
from ..._quantize.quantizer import Quantizer
from ..._quantize.stateful import StatefulQuantizeAware, _grid, _rounded, slots
from ...formats import Format


def _decode(numbers, scale, zero, **_):
    return (numbers - zero) * scale


def _dynamic(x, scale, zero, *, low, high, **_):
    return jnp.clip(jnp.round(x / scale), low, high) * scale


def _static(x, scale, zero, *, low, high, dtype, **_):
    if dtype == "binary":
        return jnp.where(x >= 0, scale, -scale)
    return _decode(jnp.clip(jnp.round(x / scale) + zero, low, high), scale, zero)


_SETTINGS = ("low", "high", "integers", "dtype", "powers", "site")
decode_p = _compat.new_primitive("jc_decode", _decode, _SETTINGS)
static_p = _compat.new_primitive("jc_static", _static, _SETTINGS)
dynamic_p = _compat.new_primitive("jc_dynamic", _dynamic, _SETTINGS)
measured_p = _compat.new_primitive("jc_measured", _static, _SETTINGS)


def _about(fmt: Format, site: Site) -> dict[str, Any]:
    element = fmt.element if isinstance(fmt, formats.BlockFormat) else fmt  # type: ignore[attr-defined]
    integers = whole(element) or isinstance(element, formats.Integer)
    return {
        "low": float(element.min),
        "high": float(element.max),
        "integers": bool(integers),
        "dtype": element.name,
        "powers": isinstance(fmt, formats.MX),
        "site": site.name,
    }


def _zero(zero: Any, scale: jax.Array) -> jax.Array:
    return jnp.zeros((1,) * scale.ndim) if zero is None else jnp.asarray(zero, jnp.float32)


def _like(x: Any, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape)


@dataclasses.dataclass(frozen=True)
class Exported(StatefulQuantizeAware):
    """A recipe whose sites show what their operands were decoded from."""

    def product(self, site: Site, setting: Any) -> None:
        return None

    def apply(self, site, setting, bind, operands, learned, state):
        values = []
        for i, (slot, x, q) in enumerate(zip(slots(site), operands, setting, strict=True)):
            kept = (learned or {}).get(slot), (state or {}).get(slot)
            values.append(self._operand(site, setting, i, x, q, *kept))
        return bind(*values), None

    def _operand(
        self, site: Site, setting: Any, i: int, x: Any, q: Quantizer | None, learned: Any, kept: Any
    ) -> Any:
        axis, q = site.contracting(i), _by_cast(q)
        if (
            q is not None
            and not is_qtensor(x)
            and not q.special
            and site.operands[i].role == "weight"
        ):
            x = q.quantize(x, axis)
        if is_qtensor(x):
            return _of_packed(x, site)
        if q is None:
            return x
        if q.range in ("static", "learned"):
            v, _, back = ranges.blocked(q, x, axis)
            _, scale, zero = _grid(q, v, learned, kept)
            if v.shape == x.shape and whole(q.format):
                return back(static_p.bind(v, scale, _zero(zero, scale), **_about(q.format, site)))
        if q.range == "fixed" and whole(q.format):
            scale, zero = q.scales(x, axis)
            args = x.astype(jnp.float32), scale, _zero(zero, scale)
            return static_p.bind(*args, **_about(q.format, site)).astype(x.dtype)
        if q.special:
            return _rounded(site, i, q, x, learned, kept)[0]
        op = operation_of(site)
        if op is not None and possible(op, site, setting.operands):
            if q.range == "absmax" and isinstance(q.format, formats.Integer) and q.format.min < 0:
                args = x.astype(jnp.float32), q.scales(x, axis)[0]
                return dynamic_p.bind(*args, jnp.zeros(()), **_about(q.format, site)).astype(
                    x.dtype
                )
            if _measured(q):
                scale, zero = q.scales(x, axis)
                args = x.astype(jnp.float32), scale, _zero(zero, scale)
                return measured_p.bind(*args, **_about(q.format, site)).astype(x.dtype)
            codes = straight_through.codes_of(x, q, axis, ())
            about = _about(q.format, site)
            if codes.zero_point is not None and q.format.max > 127:
                about |= {"low": about["low"] - 128, "high": about["high"] - 128}
            numbers, zero = codes.codes.astype(jnp.float32), _zero(codes.zero_point, codes.scale)
            return decode_p.bind(numbers, codes.scale, zero, **about).astype(x.dtype)
        return rounded_operand(site, i, q, x, False).value


class _Cast(formats.Minifloat):
    """A format whose rounding is a cast there and back: what ONNX has for fp8."""

    def round(self, v: Any, rounding: str = "half_even", key: Any = None) -> jax.Array:
        if rounding != "half_even":
            return super().round(v, rounding, key)
        inside = jax.lax.clamp(np.float32(self.min), jnp.asarray(v), np.float32(self.max))
        return inside.astype(self.dtype).astype(jnp.float32)


def _by_cast(q: Quantizer | None) -> Quantizer | None:
    """The same quantizer, rounding to fp8 by casts."""
    if q is None or q.format.name not in ("float8_e4m3fn", "float8_e5m2"):
        return q
    fields = {f.name: getattr(q.format, f.name) for f in dataclasses.fields(q.format)}
    return dataclasses.replace(q, format=_Cast(**fields))


def _measured(q: Quantizer) -> bool:
    """Whether it is what DynamicQuantizeLinear computes."""
    kind = q.range, q.format.name, q.granularity.kind, q.rounding, q.power_of_two
    return kind == ("minmax", "uint8", "tensor", "half_even", None)


def _of_packed(q: QTensor, site: Site) -> jax.Array:
    """The array that a QTensor stands for, with numbers and scales of every value."""
    numbers = q.format.from_codes(q.codes)
    scale, *rest = q.format.factors(q.scale, q.global_scale)
    for factor in rest:
        if factor.ndim and factor.ndim < scale.ndim:
            factor = factor.reshape(*factor.shape, *(1,) * (scale.ndim - factor.ndim))
        scale = scale * factor
    zero = q.zero_point

    def whole_array(x: Any) -> jax.Array:
        if q.blocks is None:
            return _like(x, q.shape)
        return q.blocks.merge(_like(x, q.blocks.split_shape(q.shape)), q.shape)

    args = numbers, whole_array(scale), whole_array(0.0 if zero is None else zero)
    return decode_p.bind(*args, **_about(q.format, site)).astype(q.dtype)


def exported(inner: Transformed) -> Callable:
    """The function that a quantized one was made of, with `Exported` in place of its transform."""
    return transformed_function(inner.fn, Exported(inner.transform.recipe), inner.argnums)  # type: ignore[attr-defined]
