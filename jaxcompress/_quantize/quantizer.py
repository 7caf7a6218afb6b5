# SPDX-License-Identifier: Apache-2.0
"""`Quantizer`: a number format, who shares a scale, and how the scale is found from the values.

    absmax   s = max|x| / max(grid)                                    codes = round(x / s)
    minmax   s = (max x - min x) / (max(grid) - min(grid)), 0 in range
             z = round(min(grid) - min x / s)                          codes = round(x / s) + z

Both are dynamic: the range comes from the very values that are quantized, so nothing is clipped
and the straight-through estimator is the identity (Bengio et al. 2013).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import formats
from .._core.qtensor import Blocks, QTensor
from .._errors import FormatError, RecipeError
from ..formats import Format
from ..formats._base import check_floating, reject_nan
from . import granularity as granularities
from .granularity import Granularity

# Under this the reciprocal of a scale overflows, or the scale itself is flushed to zero.
_SMALLEST_SCALE = np.finfo(np.float32).smallest_normal

# Ranges that are stored between calls, and those that `_quantize/state.py` and its rules compute.
STORED = ("static", "ema", "learned", "pact")
OBSERVERS = ("absmax", "minmax", "percentile", "mse", "kl")
_SPECIAL = (*STORED, "dorefa")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How an array is quantized. Immutable and hashable.

    Args:
        format: number format or its name.
        granularity: which values share a scale, or its name: "tensor", "channel", "token",
            "example", "group:32".
        range: "absmax" (symmetric) or "minmax" (with a zero point, integer formats only).
            By default minmax for unsigned integers, else absmax. An unsigned format with an
            explicit "absmax" is for arrays without negative values: it clips those to zero.
            Stored from call to call (`jc.quantize_aware_with_state`): "static" (calibrated),
            "ema" (averaged while training), "learned" (LSQ, integers, full range), "pact"
            (a learned clipping value, unsigned integers). Without scales: "dorefa".
        symmetric: True for absmax, False for minmax; another way to say `range`.
        indivisible: what happens where groups do not fit: "error", "pad" (the last group is
            shorter), or "channel" (one group).
        observer: how a static or averaged range is found from values: "absmax", "minmax", and,
            static and symmetric only, "percentile", "mse" or "kl" of a histogram.
        momentum: what remains of an averaged range at each call, 0 to 1.

    Raises:
        FormatError: if the format is unknown or cannot have a zero point.
        RecipeError: if another argument is unknown, or range and symmetric disagree.

    Example:
        >>> import jax.numpy as jnp, jaxcompress as jc
        >>> q = jc.Quantizer("int4", "group:2")
        >>> q.fake_quantize(jnp.array([7.0, -2.2, 0.7, 0.26]), axis=0)
        Array([ 7. , -2. ,  0.7,  0.3], dtype=float32)
    """

    format: Format
    granularity: Granularity = "channel"  # type: ignore[assignment]
    range: str = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
    symmetric: bool = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
    indivisible: str = dataclasses.field(default="error", kw_only=True)
    observer: str | None = dataclasses.field(default=None, kw_only=True)
    momentum: float = dataclasses.field(default=0.99, kw_only=True)

    def __post_init__(self):
        fmt = formats.get(self.format)
        symmetric = self.symmetric
        if self.range in _SPECIAL:
            self._resolve_special(fmt)
            return
        if symmetric is None:
            symmetric = fmt.min < 0 if self.range is None else self.range == "absmax"
        resolved = "absmax" if symmetric else "minmax"
        if self.range not in (None, "absmax", "minmax"):
            raise RecipeError(
                f"There is no range {self.range!r}. "
                f"Available: {', '.join(map(repr, ('absmax', 'minmax', *_SPECIAL)))}."
            )
        if self.range not in (None, resolved):
            raise RecipeError(
                f"range={self.range!r} and symmetric={symmetric} disagree: "
                "'absmax' is symmetric, 'minmax' is not. Give one of the two."
            )
        if self.observer is not None:
            raise RecipeError(
                f"observer={self.observer!r} goes with range='static' or 'ema', not {resolved!r}."
            )
        if self.indivisible not in ("error", "pad", "channel"):
            raise RecipeError(
                f"There is no indivisible={self.indivisible!r}. "
                "Available: 'error', 'pad', 'channel'."
            )
        if resolved == "minmax" and not fmt.affine:
            raise FormatError(
                f"{fmt.name} takes no zero point, so it cannot have range='minmax'. Use 'absmax'."
            )
        resolve = functools.partial(object.__setattr__, self)
        resolve("format", fmt)
        resolve("granularity", granularities.get(self.granularity))
        resolve("range", resolved)
        resolve("symmetric", bool(symmetric))

    def _resolve_special(self, fmt: Format) -> None:
        """Checks and fills in the fields of a range that is stored or learned.

        Raises:
            FormatError: if the format does not go with the range.
            RecipeError: if observer or momentum do not.
        """
        fits = {
            "learned": isinstance(fmt, formats.Integer),
            "pact": isinstance(fmt, formats.Integer) and fmt.min == 0,
            "dorefa": isinstance(fmt, formats.Integer) and fmt.min == 0,
        }
        if not fits.get(self.range, True):
            kind = "integer" if self.range == "learned" else "unsigned integer"
            raise FormatError(f"range={self.range!r} is for {kind} formats, found {fmt.name}.")
        if self.range == "learned" and fmt.min < 0:
            fmt = formats.integer(fmt.bits, narrow=False)
        averaged = self.range in ("static", "ema")
        symmetric = self.symmetric
        if symmetric is None:
            symmetric = not averaged or (fmt.min < 0 and self.observer != "minmax")
        observer = self.observer or ("absmax" if symmetric else "minmax")
        if observer not in OBSERVERS:
            raise RecipeError(f"There is no observer {observer!r}. Available: {OBSERVERS}.")
        if not averaged and (self.observer is not None or not symmetric):
            raise RecipeError(f"range={self.range!r} takes no observer and is symmetric.")
        if (observer == "minmax") == symmetric:
            raise RecipeError(
                f"observer={observer!r} and symmetric={symmetric} disagree: only 'minmax' is "
                "not symmetric."
            )
        if self.range == "ema" and observer not in ("absmax", "minmax"):
            raise RecipeError(
                f"range='ema' averages 'absmax' or 'minmax', not {observer!r}: a histogram needs "
                "range='static' and jaxcompress.calibrate."
            )
        if not symmetric and not fmt.affine:
            raise FormatError(
                f"{fmt.name} takes no zero point, so it cannot have observer='minmax'. "
                "Use 'absmax'."
            )
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum={self.momentum!r}: expected 0 <= momentum < 1.")
        settings = {"format": fmt, "granularity": granularities.get(self.granularity)}
        settings |= {"symmetric": symmetric, "observer": observer if averaged else None}
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    @property
    def special(self) -> bool:
        """Whether the range is stored, learned or none at all, and not found by `scales`."""
        return self.range in _SPECIAL

    def fake_quantize(
        self, x: jax.Array, axis: int | Sequence[int], *, sync: Sequence[str] = ()
    ) -> jax.Array:
        """Returns the quantized values of x; derivatives pass straight through.

        A stored range is not known here: the range of x itself is used instead of it.

        Computed in float32 and cast back. The tangent of the result is exactly the tangent of x,
        in forward and reverse mode and to any order. Scalars are returned unchanged. A NaN or
        infinity spreads to the values it shares a scale with.

        Args:
            x: floating, any shape.
            axis: the contracted axes, in the order of the operation.
            sync: mesh axes, inside `shard_map`, over which the range is shared.

        Returns:
            An array of the shape and dtype of x.

        Raises:
            FormatError: if x is not floating, an axis is wrong, or a group does not fit.
        """
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        check_floating(x.dtype, "fake_quantize")
        axis = self.check(x.shape, axis)
        return x if not x.shape else _fake_quantize(x, self, axis, tuple(sync))

    def quantize(self, x: jax.Array, axis: int | Sequence[int]) -> QTensor:
        """Returns x in storage; its `.dequantize()` equals `fake_quantize` exactly.

        Args:
            x: floating, at least one axis.
            axis: the contracted axes, in the order of the operation.

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
            v = x.astype(jnp.float32)
            reject_nan(v - v, self.format.name)  # NaN also where x is infinite
        return _quantize(x, self, axis)

    def scales(
        self, x: jax.Array, axis: int | Sequence[int], sync: Sequence[str] = ()
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (scale, zero_point or None), float32 of shape `scale_shape(x.shape, axis)`.

        Args:
            x: floating, any shape.
            axis: the contracted axes, in the order of the operation.
            sync: mesh axes, inside `shard_map`, over which the range is shared.
        """
        x = jnp.asarray(x)
        check_floating(x.dtype, "scales")
        return _scales(x, self, self.check(x.shape, axis), tuple(sync))

    def check(self, shape: Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
        """Returns the contracted axes, none negative, of an array that this can quantize.

        Raises:
            FormatError: if an axis is out of range or repeated, or a group does not fit.
        """
        given = (axis,) if isinstance(axis, int) else tuple(axis)
        ndim = len(shape)
        if any(not -ndim <= a < ndim for a in given):
            raise FormatError(f"axis {given} is out of range for an array of shape {shape}.")
        normal = tuple(a % ndim for a in given)
        if len(set(normal)) != len(normal):
            raise FormatError(f"axis {given} names an axis of shape {shape} twice.")
        size, length = self.granularity.size, math.prod(shape[a] for a in normal)
        if size and length % size and self.indivisible == "error":
            fits = [n for n in range(min(size, length), 0, -1) if length % n == 0][:3]
            raise FormatError(
                f"{self.granularity} does not fit shape {tuple(shape)}: axis {given} of length "
                f"{length} is not a multiple of {size}. Sizes that fit: "
                f"{', '.join(map(str, fits))}; or say indivisible='pad' or 'channel'."
            )
        return normal

    def scale_shape(self, shape: Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scales of an array of that shape.

        It is that of the array with 1 along the axes that share a scale. With groups of n it is
        that of the array with its contracted axes replaced, where the first one was, by
        (groups, 1), as in `Blocks.split`.

        Example:
            >>> import jaxcompress as jc
            >>> jc.Quantizer("int4", "group:32").scale_shape((64, 128), axis=0)
            (2, 1, 128)
        """
        shape = tuple(shape)
        blocks, shared = self._layout(shape, self.check(shape, axis))
        view = shape if blocks is None else blocks.split_shape(shape)
        return tuple(1 if i in shared else n for i, n in enumerate(view))

    def shared_axes(self, shape: Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
        """Returns the axes of the array that share a scale as a whole: none within groups.

        Example:
            >>> import jaxcompress as jc
            >>> jc.Quantizer("int8").shared_axes((64, 128), axis=0)
            (0,)
        """
        blocks, shared = self._layout(tuple(shape), self.check(shape, axis))
        return shared if blocks is None else ()

    def nbytes(self, shape: Sequence[int], axis: int | Sequence[int]) -> int:
        """Returns the bytes that an array of that shape takes: `quantize(x, axis).nbytes`.

        Packed codes, float32 scales, and zero points packed like the codes.
        """
        scale_shape = self.scale_shape(shape, axis)
        codes = formats.packed_nbytes(tuple(shape), self.format.bits)
        zeros = 0 if self.symmetric else formats.packed_nbytes(scale_shape, self.format.bits)
        return codes + 4 * math.prod(scale_shape) + zeros

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data, for JSON; `from_dict` is the inverse."""
        return {
            "format": self.format.name,
            "granularity": str(self.granularity),
            "range": self.range,
            "indivisible": self.indivisible,
            **({"observer": self.observer} if self.observer else {}),
            **({"momentum": self.momentum} if self.range == "ema" else {}),
        }

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

    def _layout(
        self, shape: tuple[int, ...], axis: tuple[int, ...]
    ) -> tuple[Blocks | None, tuple[int, ...]]:
        """Returns how the array is cut and which axes of the cut array share a scale."""
        kind, size = self.granularity.kind, self.granularity.size
        if kind == "tensor":
            return None, tuple(range(len(shape)))
        if kind == "example":
            return None, tuple(range(1, len(shape)))
        fits = size and math.prod(shape[a] for a in axis) % size == 0
        if kind != "group" or not (fits or self.indivisible == "pad"):
            return None, axis
        blocks = Blocks(tuple(a - len(shape) for a in axis), size)
        return blocks, (blocks.inner_axis(len(shape)),)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def jaxcompress_fake_quantize(
    x: jax.Array, quantizer: Quantizer, axis: tuple[int, ...], sync: tuple[str, ...]
) -> jax.Array:
    """The primal of `Quantizer.fake_quantize`. Its name marks it in jaxprs."""
    blocks, shared = quantizer._layout(x.shape, axis)
    v = _view(x, blocks)
    scale, zero = _find_scales(v, quantizer, shared, sync)
    grid = _divide(v, scale)
    if zero is None:
        grid = quantizer.format.round(grid)
    else:
        zero = _broadcast(zero, v.shape)
        shifted = lax.add(lax.round(grid, lax.RoundingMethod.TO_NEAREST_EVEN), zero)
        grid = lax.sub(quantizer.format.round(shifted), zero)
    out = lax.mul(grid, _broadcast(scale, v.shape))
    out = out if blocks is None else blocks.merge(out, x.shape)
    return lax.convert_element_type(out, x.dtype)


@jaxcompress_fake_quantize.defjvp
def _straight_through(quantizer, axis, sync, primals, tangents):
    return jaxcompress_fake_quantize(*primals, quantizer, axis, sync), tangents[0]


# One jit each, so that a repeated shape is traced once. `quantize` and `scales` are jitted too
# because XLA rounds a division by a constant differently inside a jit than outside.
_fake_quantize = jax.jit(jaxcompress_fake_quantize, static_argnums=(1, 2, 3))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(x: jax.Array, quantizer: Quantizer, axis: tuple[int, ...]) -> QTensor:
    blocks, shared = quantizer._layout(x.shape, axis)
    v = _view(x, blocks)
    scale, zero = _find_scales(v, quantizer, shared, ())
    codes = quantizer.format.encode(v, scale, zero)
    codes = codes if blocks is None else blocks.merge(codes, x.shape)
    return QTensor.from_codes(
        codes, scale, zero, format=quantizer.format, dtype=x.dtype, blocks=blocks
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _scales(
    x: jax.Array, quantizer: Quantizer, axis: tuple[int, ...], sync: tuple[str, ...]
) -> tuple[jax.Array, jax.Array | None]:
    blocks, shared = quantizer._layout(x.shape, axis)
    return _find_scales(_view(x, blocks), quantizer, shared, sync)


def _find_scales(
    v: jax.Array, quantizer: Quantizer, shared: tuple[int, ...], sync: tuple[str, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scale, and the zero point or None, of float32 v over the shared axes."""
    fmt = quantizer.format
    if quantizer.symmetric:
        absmax = lax.reduce_max(lax.abs(v), shared)
        absmax = lax.pmax(absmax, sync) if sync else absmax
        return lax.expand_dims(_scale(absmax, fmt.max), shared), None
    low, high = lax.reduce_min(v, shared), lax.reduce_max(v, shared)
    if sync:
        low, high = lax.pmin(low, sync), lax.pmax(high, sync)
    low, high = lax.min(low, _like(0, low)), lax.max(high, _like(0, high))
    scale = _scale(lax.sub(high, low), fmt.max - fmt.min)
    zero = fmt.round(lax.sub(_like(fmt.min, low), lax.div(low, scale)))
    return lax.expand_dims(scale, shared), lax.expand_dims(zero, shared)


def _scale(extent: jax.Array, steps: float) -> jax.Array:
    """extent / steps, or 1 where that is zero or subnormal. NaN stays NaN."""
    scale = lax.div(extent, _like(steps, extent))
    return lax.select(lax.lt(scale, _like(_SMALLEST_SCALE, scale)), _like(1, scale), scale)


def _view(x: jax.Array, blocks: Blocks | None) -> jax.Array:
    v = lax.convert_element_type(x, jnp.float32)
    return v if blocks is None else blocks.split(v)


def _divide(v: jax.Array, scale: jax.Array) -> jax.Array:
    return lax.div(v, _broadcast(scale, v.shape))


def _broadcast(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(a, shape, tuple(range(len(shape))))


def _like(value: float, a: jax.Array) -> jax.Array:
    return lax.full_like(a, value)
