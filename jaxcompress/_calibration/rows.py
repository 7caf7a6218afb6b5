# SPDX-License-Identifier: Apache-2.0
"""Every site as a linear layer: its weight as [*lead, out, in], its input as [*lead, tokens, in].

    matmul        lead: batch dimensions (experts); in: contracted dimensions, in their order
    convolution   tokens: output positions; in: input channels, then the window (im2col);
                  lead: the groups of a grouped convolution
    ragged matmul lead: the groups (experts); a row is zero for all groups but its own

In these rows output = w x, so that methods are written once, as their papers are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.sites import Site

_OPS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")


@dataclasses.dataclass(frozen=True)
class Rows:
    """How the weight of a site is laid out as [*lead, out, in].

    Attributes:
      weight: position of the weight among the operands; the input is the other one.
      shape: of the weight as the site sees it.
      order: its dimensions: those of `lead`, of `out` and of `in`.
      counts: how many of them are of `lead`, `out` and `in`.
      groups: of a grouped convolution, else 1.
      convolves: whether `in` are the channels of a convolution, each with its window.
    """

    weight: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    counts: tuple[int, int, int]
    groups: int = 1
    convolves: bool = False

    @property
    def contracted(self) -> tuple[int, ...]:
        """Dimensions of the weight that make up `in`."""
        return self.order[self.counts[0] + self.counts[1] :]

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of `lead`."""
        sizes = tuple(self.shape[d] for d in self.order[: self.counts[0]])
        return sizes if self.groups == 1 else (self.groups,)

    @property
    def channels(self) -> int:
        """Size of `in`."""
        return math.prod(self.shape[d] for d in self.contracted)

    def over_stack(self, f: Callable, v: jax.Array) -> Callable:
        """`f` of the weight of one layer, for each of a stack of them like v, [*stack, *shape]."""
        for _ in range(v.ndim - len(self.shape)):
            f = jax.vmap(f)
        return f

    def of(self, w: jax.Array) -> jax.Array:
        """A weight of the site as [*lead, out, in]."""
        return lax.transpose(w, self.order).reshape(*self.lead, -1, self.channels)

    def back(self, rows: jax.Array, inside: bool = True) -> jax.Array:
        """Inverse of `of`.

        Args:
          rows: [*lead, out, in], or [*lead, out, n].
          inside: whether the last axis is `in`. Otherwise the result has, in the place of the first
            contracted dimension, an axis of size n and one of size 1, and no contracted ones: the
            shape of scales of groups of values.
        """
        kept = self.order[: len(self.order) - self.counts[2]]
        sizes = [self.shape[d] for d in kept]
        place = dict(zip(self.order, range(len(self.order)), strict=True))
        if inside:
            full = rows.reshape(*sizes, *(self.shape[d] for d in self.contracted))
            return lax.transpose(full, [place[d] for d in range(len(self.shape))])
        full = rows.reshape(*sizes, rows.shape[-1], 1)
        first = min(self.contracted)
        before = [place[d] for d in sorted(kept) if d < first]
        after = [place[d] for d in sorted(kept) if d > first]
        return lax.transpose(full, [*before, len(kept), len(kept) + 1, *after])


def rows_of(site: Site, weight: int) -> Rows | None:
    """The layout of a site's weight; None where there is none (lookups, two weights)."""
    if site.op not in _OPS or site.opaque or len(site.weights) != 1:
        return None
    shape = site.operands[weight].shape
    if site.op == "conv_general_dilated":
        spec = site.params["dimension_numbers"].rhs_spec
        if site.params["batch_group_count"] != 1 or weight != 1:
            return None
        groups = site.params["feature_group_count"]
        return Rows(1, shape, tuple(spec), (0, 1, len(spec) - 1), groups, True)
    if site.op.startswith("ragged_dot"):
        lead = _ragged_groups(site, weight)
        if lead is None:
            return None
    else:
        lead = tuple(site.params["dimension_numbers"][1][weight])
    contracted = site.contracting(weight)
    out = tuple(d for d in range(len(shape)) if d not in (*lead, *contracted))
    counts = (len(lead), len(out), len(contracted))
    return Rows(weight, shape, (*lead, *out, *contracted), counts)


def _ragged_groups(site: Site, weight: int) -> tuple[int, ...] | None:
    """Dimensions of the weight that run over groups; None unless it is rows times experts."""
    numbers = site.params.get("ragged_dot_dimension_numbers")
    if weight != 1 or numbers is None or len(numbers.rhs_group_dimensions) != 1:
        return None
    if tuple(numbers.dot_dimension_numbers[1][0]) or len(numbers.lhs_ragged_dimensions) != 1:
        return None
    return tuple(numbers.rhs_group_dimensions)


def input_rows(
    site: Site, rows: Rows, x: jax.Array, rest: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """The input of a site as float32 [*lead, tokens, in], and how many tokens there are, [*lead].

    Args:
      site: the site.
      rows: layout of its weight.
      x: its other operand.
      rest: operands behind these two: the sizes of the groups of a ragged matmul.
    """
    x = x.astype(jnp.float32)
    if site.op == "conv_general_dilated":
        flat = _patches(site, rows, x)
        return flat, jnp.full(rows.lead, flat.shape[-2], jnp.float32)
    lead = ()
    if site.op == "dot_general":
        lead = tuple(site.params["dimension_numbers"][1][1 - rows.weight])
    contracted = site.contracting(1 - rows.weight)
    tokens = tuple(d for d in range(x.ndim) if d not in (*lead, *contracted))
    flat = lax.transpose(x, (*lead, *tokens, *contracted))
    flat = flat.reshape(*(x.shape[d] for d in lead), -1, rows.channels)
    if not site.op.startswith("ragged_dot"):
        return flat, jnp.full(rows.lead, flat.shape[-2], jnp.float32)
    ends = jnp.cumsum(rest[0])
    number = jnp.searchsorted(ends, jnp.arange(flat.shape[0]), side="right")
    own = number[None] == jnp.arange(rows.lead[0])[:, None]
    return flat[None] * own[..., None], jnp.sum(own.astype(jnp.float32), -1)


def _patches(site: Site, rows: Rows, x: jax.Array) -> jax.Array:
    p = site.params
    numbers = p["dimension_numbers"]
    window = [rows.shape[d] for d in numbers.rhs_spec[2:]]
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        p["window_strides"],
        p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
    )
    patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
    flat = patches.reshape(-1, rows.groups, rows.channels)
    return flat[:, 0] if rows.groups == 1 else jnp.moveaxis(flat, 1, 0)
