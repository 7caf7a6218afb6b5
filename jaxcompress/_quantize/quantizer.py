# SPDX-License-Identifier: Apache-2.0
"""`Quantizer`: a number format, who shares a scale, and how the scale is found from the values.

    absmax   s = max|x| / max(grid)                                    codes = round(x / s)
    minmax   s = (max x - min x) / (max(grid) - min(grid)), 0 in range
             z = round(min(grid) - min x / s)                          codes = round(x / s) + z

These and the means of ternary and binary weights follow the very values that are quantized, and
their straight-through estimator is the identity (Bengio et al. 2013). Ranges that clip on purpose
(`ranges.py`) pass the gradient of what is inside, edges included, and none of what is outside.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from .. import formats
from .._core.qtensor import QTensor
from .._errors import FormatError, RecipeError
from ..formats import Format
from ..formats._checks import check_floating, reject_nan
from ..formats._rounding import check
from . import layout, ranges, settings, straight_through
from .granularity import Granularity


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How an array is quantized. Immutable and hashable.

    Args:
        format: number format or its name.
        granularity: which values share a scale, or its name: "tensor", "channel", "token",
            "example", "group:32", "block:128x128". By default the block of a block format, along
            the contracted axes, else "channel". Constant ranges are per tensor.
        range: how far the values that share a scale go: "absmax", "percentile", "mse", "kl",
            "rms", "absmean" (ternary and binary formats), "twn" (ternary), "fixed", or with a zero
            point (integer formats only) "minmax". By default minmax for unsigned integers, absmean
            for ternary and binary, fixed for formats that need no scale (float16, bfloat16, fixed
            point, learned codebooks), else absmax. An unsigned format with an explicit "absmax" is
            for arrays without negative values: it clips those to zero. Stored from call to call
            (`jc.quantize_aware_with_state`): "static" (calibrated), "ema" (averaged while
            training), "learned" (LSQ, integers, full range), "pact" (a learned clipping value,
            unsigned integers). Without scales: "dorefa".
        symmetric: False for a zero point: "minmax", and "percentile" and "mse" of both ends.
        indivisible: what happens where groups do not fit: "error", "pad" (the last group is
            shorter), or "channel" (one group).
        rounding: "half_even", "half_away", "floor", or "stochastic", which is unbiased and needs a
            key in each call.
        range_value: percentile p in (50, 100], by default 99.9; multiple k of the root mean square,
            by default 3; the extent of "fixed", by default the largest number of the format.
        convention: what the extent is mapped to, integer formats only: "max", the largest number;
            "half", (2^bits - 1) / 2, which is 127.5 or 7.5 (qwix; compressed-tensors with the full
            formats such as "int4_full"); "signed", where the value of largest absolute value
            becomes the lowest number and the scale may be negative (llama.cpp Q4_0).
        power_of_two: None, or how scales are rounded to powers of two: "ceil" (nothing is
            clipped), "round" (nearest exponent) or "floor".
        observer: how a static or averaged range is found from values: "absmax", "minmax", and,
            static and symmetric only, "percentile", "mse" or "kl" of a histogram.
        momentum: what remains of an averaged range at each call, 0 to 1.

    Raises:
        FormatError: if the format is unknown or does not have what is asked.
        RecipeError: if another argument is unknown, or range and symmetric disagree.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> q = jc.Quantizer("int4", "group:2")
        >>> q.fake_quantize(jnp.array([7.0, -2.2, 0.7, 0.26]), axis=0)
        Array([ 7. , -2. ,  0.7,  0.3], dtype=float32)
    """

    format: Format
    granularity: Granularity = None  # type: ignore[assignment]
    range: str = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
    symmetric: bool = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
    indivisible: str = dataclasses.field(default="error", kw_only=True)
    rounding: str = dataclasses.field(default="half_even", kw_only=True)
    range_value: float | None = dataclasses.field(default=None, kw_only=True)
    convention: str = dataclasses.field(default="max", kw_only=True)
    power_of_two: str | None = dataclasses.field(default=None, kw_only=True)

    observer: str | None = dataclasses.field(default=None, kw_only=True)
    momentum: float = dataclasses.field(default=0.99, kw_only=True)

    if TYPE_CHECKING:  # names are taken for formats and granularities

        def __init__(
            self,
            format: str | Format,
            granularity: str | Granularity | None = None,
            *,
            range: str | None = None,
            symmetric: bool | None = None,
            indivisible: str = "error",
            rounding: str = "half_even",
            range_value: float | None = None,
            convention: str = "max",
            power_of_two: str | None = None,
            observer: str | None = None,
            momentum: float = 0.99,
        ): ...

    def __post_init__(self):
        for name, value in settings.resolved(self).items():
            object.__setattr__(self, name, value)

    @property
    def top(self) -> float:
        """The number of the grid that the extent of the values is mapped to."""
        return (2**self.format.bits - 1) / 2 if self.convention == "half" else self.format.top

    @property
    def clips(self) -> bool:
        """Whether the range leaves values outside, which then have no gradient."""
        return self.range in ranges.CLIPPING

    @property
    def special(self) -> bool:
        """Whether the range is stored, learned or none at all, and not found by `scales`."""
        return self.range in settings.SPECIAL

    def fake_quantize(
        self,
        x: jax.Array,
        axis: int | Sequence[int],
        *,
        sync: Sequence[str] = (),
        key: Any = None,
    ) -> jax.Array:
        """Returns the quantized values of x; derivatives pass straight through.

        Computed in float32 and cast back. The tangent of the result is exactly the tangent of x
        (zero where a range that clips leaves a value outside), in forward and reverse mode and to
        any order. Scalars are returned unchanged. A NaN or infinity spreads to the values it
        shares a scale with.

        A stored range is not known here: the range of x itself is used instead of it.

        Args:
            x: floating, any shape.
            axis: the contracted axes, in the order of the operation.
            sync: mesh axes, inside `shard_map`, over which the range is shared.
            key: PRNG key of stochastic rounding; a new one for each step.

        Returns:
            An array of the shape and dtype of x.

        Raises:
            FormatError: if x is not floating, an axis is wrong, a group does not fit, or
                stochastic rounding has no key.
        """
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        check_floating(x.dtype, "fake_quantize")
        axis = self.check(x.shape, axis)
        check(self.rounding, key)
        return x if not x.shape else straight_through.fake_quantize(x, key, self, axis, tuple(sync))

    def quantize(self, x: jax.Array, axis: int | Sequence[int], *, key: Any = None) -> QTensor:
        """Returns x in storage; its `.dequantize()` equals `fake_quantize` exactly.

        Args:
            x: floating, at least one axis.
            axis: the contracted axes, in the order of the operation.
            key: PRNG key of stochastic rounding.

        Raises:
            FormatError: as `fake_quantize`; if x is a scalar; if x is concrete and has NaNs or
                infinities and the format has no NaN.

        Example:
            >>> import jax.numpy as jnp, jaxcompress as jc
            >>> jc.Quantizer("int4").quantize(jnp.ones((64, 128)), axis=0).nbytes
            4608
        """
        x = jnp.asarray(x)
        check_floating(x.dtype, "quantize")
        axis = self.check(x.shape, axis)
        if not x.shape:
            raise FormatError("quantize takes an array with at least one axis, got a scalar.")
        if not self.format.has_nan:
            reject_nan(x, self.format.name, infinite=True)  # its scale is infinite, then NaN
        check(self.rounding, key)
        return straight_through.quantize(x, key, self, axis)

    def scales(
        self, x: jax.Array, axis: int | Sequence[int], sync: Sequence[str] = ()
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (scale, zero_point or None), float32 of shape `scale_shape(x.shape, axis)`.

        Scales that a format stores in few bits or in two levels come as the number they stand for.

        Args:
            x: floating, any shape.
            axis: the contracted axes, in the order of the operation.
            sync: mesh axes, inside `shard_map`, over which the range is shared.
        """
        x = jnp.asarray(x)
        check_floating(x.dtype, "scales")
        return straight_through.find_scales(x, self, self.check(x.shape, axis), tuple(sync))

    def check(self, shape: Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
        """Returns the contracted axes, none negative, of an array that this can quantize.

        Raises:
            FormatError: if an axis is out of range or repeated, or a group does not fit.
        """
        return layout.check(shape, axis, self.granularity, self.indivisible)

    def scale_shape(self, shape: Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scales of an array of that shape.

        It is that of the array with 1 along the axes that share a scale. With groups of n it is
        that of the array with its contracted axes replaced, where the first one was, by
        (groups, 1), as in `Blocks.split`; with blocks the other axes are cut likewise.

        Example:
            >>> import jaxcompress as jc
            >>> jc.Quantizer("int4", "group:32").scale_shape((64, 128), axis=0)
            (2, 1, 128)
        """
        shape, axis = tuple(shape), self.check(shape, axis)
        blocks, shared = layout.cut(shape, axis, self.granularity, self.indivisible)
        view = shape if blocks is None else blocks.split_shape(shape)
        return tuple(1 if i in shared else n for i, n in enumerate(view))

    def shared_axes(self, shape: Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
        """Returns the axes of the array that share a scale as a whole: none within groups.

        All axes share the second scale of a format with two levels.

        Example:
            >>> import jaxcompress as jc
            >>> jc.Quantizer("int8").shared_axes((64, 128), axis=0)
            (0,)
        """
        shape, axis = tuple(shape), self.check(shape, axis)
        blocks, shared = layout.cut(shape, axis, self.granularity, self.indivisible)
        if self.format.two_level:
            return tuple(range(len(shape)))
        return shared if blocks is None else ()

    def nbytes(self, shape: Sequence[int], axis: int | Sequence[int]) -> int:
        """Returns the bytes that an array of that shape takes: `quantize(x, axis).nbytes`.

        Packed codes, scales (float32, or one byte where the format says so), zero points packed
        like the codes, four bytes for the second level of scales, and the table of a codebook that
        is not a standard one.
        """
        fmt, scale_shape = self.format, self.scale_shape(shape, axis)
        codes = fmt.packed_nbytes(tuple(shape))
        zeros = 0 if self.symmetric else fmt.packed_nbytes(scale_shape)
        scale = fmt.scale_dtype.itemsize * math.prod(scale_shape)
        return codes + scale + zeros + 4 * fmt.two_level + fmt.table_nbytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data, for JSON; `from_dict` is the inverse.

        Settings that few quantizers have are left out where they are at their default.
        """
        out = {
            "format": formats.to_data(self.format),
            "granularity": str(self.granularity),
            "range": self.range,
            "indivisible": self.indivisible,
            **({"observer": self.observer} if self.observer else {}),
            **({"momentum": self.momentum} if self.range == "ema" else {}),
        }
        if self.range in ranges.EITHER:
            out["symmetric"] = self.symmetric
        for field in dataclasses.fields(self):
            if field.name in ("rounding", "range_value", "convention", "power_of_two"):
                if (value := getattr(self, field.name)) != field.default:
                    out[field.name] = value
        return out

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Quantizer":
        """Returns the quantizer with these settings.

        Raises:
            RecipeError: if a setting is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise RecipeError(f"A quantizer has no settings {unknown}. Available: {known}.")
        return cls(**settings)
