# SPDX-License-Identifier: Apache-2.0
"""Scale pairs: what can divide a site's input channels by s while its weight is multiplied by s."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._errors import SiteError
from .. import _compat
from ..patterns import nearest
from ..tabular import Tabular
from .params import ParamTree


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """A parameter that changes with a scale.

    Attributes:
      path: its key path.
      axes: the axes along which the factors vary.
      exponent: the parameter is multiplied by s**exponent: -1 for most producers, 1 for consumers.
      index: int32 with the sizes of `axes`: flat index into s, -1 where nothing changes.
      number: of the parameter, in the order of the leaves.
    """

    path: str
    axes: tuple[int, ...]
    exponent: float
    index: np.ndarray = dataclasses.field(repr=False)
    number: int = dataclasses.field(repr=False)

    def scaled(self, w: jax.Array, s: jax.Array) -> jax.Array:
        """The parameter times s**exponent, computed in float32 at least."""
        factor = jnp.take(jnp.ravel(s), np.maximum(self.index, 0)) ** self.exponent
        factor = jnp.where(self.index < 0, 1, factor)
        shape = [n if a in self.axes else 1 for a, n in enumerate(w.shape)]
        wide = jnp.promote_types(w.dtype, jnp.float32)
        return (w.astype(wide) * factor.reshape(shape).astype(wide)).astype(w.dtype)

    def absmax(self, w: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """float32[shape]: the largest absolute value for each scale."""
        rest = tuple(a for a in range(w.ndim) if a not in self.axes)
        largest = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=rest)
        return _reduced(largest, self.index, shape, "max")


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A site whose input becomes x / s.

    Attributes:
      site: its name.
      operand: position of that input among its operands.
      index: int32[*batch, channels]: for every input channel the channel of s, -1 if s does not
        reach it. Channels are the contracted dimensions of a matmul in its order, and the input
        channels of a convolution.
      stack: for every size in `Site.stack`, whether s has that axis of layers.
      shape: of s.
    """

    site: str
    operand: int
    index: np.ndarray = dataclasses.field(repr=False)
    stack: tuple[bool, ...]
    shape: tuple[int, ...]

    def pool(self, x: jax.Array, reduce: str = "max") -> jax.Array:
        """Statistics of the channels, float[*site.stack, *batch, channels], for each scale.

        Args:
          x: the statistics.
          reduce: `"max"`, `"min"`, `"sum"` or `"mean"` over channels (and layers) with one scale.

        Returns:
          float[shape of s].
        """
        lead = jnp.shape(x)[: len(self.stack)]
        return _reduced(jnp.asarray(x), self._flat(lead), self.shape, reduce)

    def spread(self, s: jax.Array) -> jax.Array:
        """s for every input channel, float[*stack, *batch, channels]; 1 where it does not reach.

        Axes of the stack that s does not have are 1 long.
        """
        sizes = iter(self.shape[:-1])
        index = self._flat([next(sizes) if layer else 1 for layer in self.stack])
        return jnp.where(index < 0, 1, jnp.take(jnp.ravel(s), np.maximum(index, 0)))

    def _flat(self, lead: Sequence[int]) -> np.ndarray:
        """Flat indices into s, int32[*lead, *batch, channels]."""
        layer = np.zeros((1,) * len(lead), np.int32)
        for j, (n, there) in enumerate(zip(lead, self.stack, strict=True)):
            if there:
                sizes = [n if k == j else 1 for k in range(len(lead))]
                layer = layer * n + np.arange(n, dtype=np.int32).reshape(sizes)
        layer = layer.reshape(*layer.shape, *(1,) * self.index.ndim)
        index = np.where(self.index < 0, -1, layer * self.shape[-1] + self.index)
        return np.broadcast_to(index, (*lead, *self.index.shape))


def _reduced(x: jax.Array, index: np.ndarray, shape: tuple[int, ...], reduce: str) -> jax.Array:
    """Values with the same index reduced to one; those with index -1 are left out."""
    kinds = {
        "max": jax.ops.segment_max,
        "min": jax.ops.segment_min,
        "sum": jax.ops.segment_sum,
        "mean": jax.ops.segment_sum,
    }
    if reduce not in kinds:
        raise SiteError(f"reduce={reduce!r}: expected one of {sorted(kinds)}.")
    there = np.flatnonzero(index.ravel() >= 0)
    where, count = index.ravel()[there], math.prod(shape)
    out = kinds[reduce](jnp.ravel(x)[there], where, count)
    if reduce == "mean":
        out = out / np.maximum(np.bincount(where, minlength=count), 1)
    return out.reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePair:
    """Producers divided by s and consumers multiplied by s: the function stays the same.

    Attributes:
      name: of the first producer and the first consumer.
      shape: of s, (*layers, channels).
      producers, consumers: the parameters with negative and with positive exponents.
      uses: the sites whose input is divided by s.
    """

    name: str
    shape: tuple[int, ...]
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    uses: tuple[Use, ...]
    tree: ParamTree = dataclasses.field(repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the scans over layers in which s differs from layer to layer."""
        return self.shape[:-1]

    @property
    def channels(self) -> int:
        """Number of scales in a layer."""
        return self.shape[-1]

    def apply(self, params: Any, s: Any) -> Any:
        """New parameters for positive scales s, float[shape]."""
        return _apply(self.tree, params, {self: s})

    def absmax(self, params: Any) -> dict[Member, jax.Array]:
        """For every member the largest absolute value for each scale, float32[shape]."""
        flat = self.tree.arrays(params)
        members = (*self.producers, *self.consumers)
        return {m: m.absmax(jnp.asarray(flat[m.number]), self.shape) for m in members}


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePairs(Tabular):
    """The scale pairs of a function; prints as a table.

    Attributes:
      pairs: all of them, in program order; independent of each other.
      sites: names of the sites with a weight and an input, in program order.
      blocked: {site: why (a part of) its input channels cannot be scaled}.
    """

    pairs: tuple[ScalePair, ...]
    sites: tuple[str, ...]
    blocked: Mapping[str, str]
    tree: ParamTree = dataclasses.field(repr=False)

    def of(self, site: str) -> tuple[ScalePair, ...]:
        """The pairs that scale input channels of a site.

        Raises:
          SiteError: there is no such site.
        """
        if site not in self.sites:
            raise SiteError(
                f"scale pairs: `{site}` is no site with a weight and an input. Nearest: "
                f"{nearest(site, self.sites)}."
            )
        return tuple(p for p in self.pairs if any(use.site == site for use in p.uses))

    def apply(self, params: Any, scales: Mapping[ScalePair, Any]) -> Any:
        """New parameters for positive scales float[pair.shape]; the function stays the same.

        Raises:
          SiteError: other parameters, a QTensor, scales of another shape or not positive.
        """
        return _apply(self.tree, params, scales)

    @property
    def title(self) -> str:
        return f"{len(self.pairs)} scale pairs at {len(self.sites)} sites"

    @property
    def columns(self) -> Sequence[tuple[str, bool]]:
        return (("site", False), ("divided by s", False), ("multiplied by s", False), ("s", False))

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        rows = []
        for site in self.sites:
            for pair in self.of(site):
                sides = [", ".join(map(_shown, ms)) for ms in (pair.producers, pair.consumers)]
                rows.append((site, *sides, "x".join(map(str, pair.shape))))
            if site in self.blocked:
                rows.append((site, self.blocked[site], "", ""))
        return rows


def _shown(m: Member) -> str:
    power = f" ^{m.exponent:g}" if abs(m.exponent) != 1 else ""
    return f"{m.path}:{','.join(map(str, m.axes))}{power}"


def _apply(tree: ParamTree, params: Any, scales: Mapping[ScalePair, Any]) -> Any:
    call, flat = tree.split(params)
    flat = [jnp.asarray(x) for x in flat]
    for pair, s in scales.items():
        s = jnp.asarray(s)
        if s.shape != pair.shape:
            raise SiteError(
                f"the scales of `{pair.name}` have shape {list(s.shape)}; expected "
                f"{list(pair.shape)}."
            )
        if not isinstance(s, _compat.Tracer) and not bool(jnp.all((s > 0) & jnp.isfinite(s))):
            raise SiteError(
                f"the scales of `{pair.name}` must be positive and finite; the smallest is "
                f"{float(jnp.min(s))}. Clip them, such as jnp.maximum(s, 1e-5)."
            )
        for m in (*pair.producers, *pair.consumers):
            flat[m.number] = m.scaled(flat[m.number], s)
    return tree.merge(call, flat)
