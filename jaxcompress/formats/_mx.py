# SPDX-License-Identifier: Apache-2.0
"""OCP Microscaling (MX) v1.0: 32 elements share a power of two; and block floating point.

    X = 2^(floor(log2 max|v|) - emax)        P_i = round(v_i / X), saturating         (section 6.3)

Three scale rules are in use and not compatible, see `_e8m0.e8m0_scale`: "floor" is that of the
standard. Under it a block's largest value may be up to 2^(emax + 1) X and saturates; the
straight-through estimator nevertheless is the identity, as in the standard's emulation library
microxcaling: the scale follows the value, so a mask would freeze the largest weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import FormatError
from ._base import Format
from ._block import BlockFormat
from ._e8m0 import check_rule, e8m0_factors, e8m0_scale
from ._fixed import FixedPoint, fixed_point
from ._minifloat import (
    NAMED,
    Minifloat,
    float4_e2m1fn,
    float6_e2m3fn,
    float6_e3m2fn,
    float8_e4m3fn,
    float8_e5m2,
    minifloat,
)


@dataclasses.dataclass(frozen=True, repr=False)
class MX(BlockFormat):
    """Elements of a small format and an E8M0 scale, stored as uint8, for each block.

    `encode` and `decode` are those of the elements. They take the scale in float, or as uint8
    exponents with the bias 127. A NaN or infinity makes NaN of the scale and the block.
    """

    scale_rule: str
    block: int = 32  # type: ignore[assignment]

    @property
    def scale_dtype(self) -> np.dtype:
        return jnp.dtype(jnp.uint8)

    def find_scale(self, extent: jax.Array, global_scale: Any = None) -> jax.Array:
        return e8m0_scale(extent, self.max, self.scale_rule)

    def factors(self, scale: Any, global_scale: Any = None) -> tuple[jax.Array, ...]:
        scale = jnp.asarray(scale)
        return e8m0_factors(scale) if scale.dtype == jnp.uint8 else super().factors(scale)

    def settings(self) -> dict[str, Any]:
        named = NAMED.get(self.element.name) == self.element
        return {
            "maker": "mx",
            "element": self.element.name if named else self.element.settings(),
            "scale_rule": self.scale_rule,
            "block": self.block,
        }


_ELEMENTS = {
    "e4m3": float8_e4m3fn,
    "e5m2": float8_e5m2,
    "e2m3": float6_e2m3fn,
    "e3m2": float6_e3m2fn,
    "e2m1": float4_e2m1fn,
    "int8": fixed_point(8, 6, narrow=True),
}
_MAKERS = {"fixed_point": fixed_point, "minifloat": minifloat}
_NAMES = {
    float8_e4m3fn: "mxfp8_e4m3",
    float8_e5m2: "mxfp8_e5m2",
    float6_e2m3fn: "mxfp6_e2m3",
    float6_e3m2fn: "mxfp6_e3m2",
    float4_e2m1fn: "mxfp4",
    _ELEMENTS["int8"]: "mxint8",
}


def mx(element: str | Format, *, scale_rule: str = "floor", block: int = 32) -> MX:
    """Returns the MX format of these elements.

    Args:
        element: "e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8" (k / 64, as in section 5.3.4), the
            name of a minifloat such as "float4_e2m1fn", or a minifloat or fixed-point format.
        scale_rule: "floor" (the standard), "round" (compressed-tensors) or "ceil" (NVIDIA).
        block: values that share a scale; 32 in the standard.

    Raises:
        FormatError: if the element, the rule or the block is wrong.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.mx("e2m1", scale_rule="ceil").bits
        4.25

    References: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6.
    """
    fmt = _ELEMENTS.get(element) or NAMED.get(element) if isinstance(element, str) else element
    if isinstance(element, dict):
        settings = dict(element)
        maker = _MAKERS.get(settings.pop("maker", ""))
        fmt = None if maker is None else maker(**settings)
    if not isinstance(fmt, Minifloat | FixedPoint):
        raise FormatError(
            f"MX has no elements {element!r}. Available: {', '.join((*_ELEMENTS, *NAMED))}, or a "
            "minifloat or fixed-point format."
        )
    check_rule(scale_rule)
    _check_block(block)
    name = _NAMES.get(fmt, f"mx_{fmt.name}")
    name += f"_block{block}" * (block != 32) + f"_{scale_rule}" * (scale_rule != "floor")
    bits = fmt.code_bits + 8 / block
    return MX(name, bits, fmt.min, fmt.max, fmt.dtype, fmt, scale_rule, block)


def block_float(mantissa_bits: int, block: int) -> MX:
    """Returns block floating point: integers of so many bits that share an exponent.

    The mantissas are k 2^(2 - mantissa_bits), |k| < 2^(mantissa_bits - 1), and the shared
    exponent is floor(log2 max|v|), stored in a byte: `block_float(8, 32)` is `mxint8`.

    Args:
        mantissa_bits: 2 to 16, with the sign.
        block: values that share an exponent.

    Raises:
        FormatError: if an argument is out of range.

    Example:
        >>> import jaxcompress as jc
        >>> jc.formats.block_float(4, 16).bits
        4.5

    References: Wilkinson 1963, Rounding Errors in Algebraic Processes, section 1; Darvish Rouhani
    et al. 2020 (MSFP).
    """
    return mx(fixed_point(mantissa_bits, mantissa_bits - 2, narrow=True), block=block)


def _check_block(block: int) -> None:
    if not isinstance(block, int) or block < 1:
        raise FormatError(f"A block has at least one value, asked for {block!r}.")


mxfp8_e4m3, mxfp8_e5m2 = mx("e4m3"), mx("e5m2")
mxfp6_e2m3, mxfp6_e3m2 = mx("e2m3"), mx("e3m2")
mxfp4, mxint8 = mx("e2m1"), mx("int8")
