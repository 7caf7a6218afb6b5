# SPDX-License-Identifier: Apache-2.0
"""Statistics of a site's inputs between rows [*lead, in] and the channels of a scale pair."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..._calibration.rows import Rows, rows_of
from ..._core.sites import Site

if TYPE_CHECKING:
    from ..._core.channels import ScalePair, ScalePairs


def found_pairs(job: Any) -> tuple[ScalePairs, dict[str, tuple[Site, Rows, Any]]]:
    """(the scale pairs of a job, by name the sites whose weight is quantized in rows).

    Each site comes with its layout and the quantizer of its weight. Notes say which sites no pair
    reaches, and why.
    """
    from ..._core.channels import scale_pairs  # it takes long to import

    traced = job.trace()
    sites = {}
    for site in traced.plan.everything:
        rows = rows_of(site, site.weights[0]) if site.weights else None
        quantizer = traced.settings[site.name][site.weights[0]] if rows else None
        if rows is not None and quantizer is not None:
            sites[site.name] = (site, rows, quantizer)
    found = scale_pairs(job.fn)(job.params, *job.inputs.args, **job.inputs.kwargs)
    for name in sites:
        if name in found.blocked:
            job.notes[name] = f"inputs are not scaled: {found.blocked[name]}"
    return found, sites


def used(pair: ScalePair, sites: Any) -> list[Any]:
    """The uses of a pair at sites that are quantized."""
    return [use for use in pair.uses if use.site in sites]


def _window(rows: Rows) -> int:
    """How many inputs in rows are of one channel."""
    return math.prod(rows.shape[d] for d in rows.contracted[1:]) if rows.convolves else 1


def channels_of(rows: Rows, x: jax.Array, reduce: Any) -> jax.Array:
    """[*stack, *lead, in] as [*stack, *batch, C]."""
    n = _window(rows)
    x = reduce(x.reshape(*x.shape[:-1], -1, n), -1)
    return x.reshape(*x.shape[:-2], -1) if rows.groups > 1 else x


def inputs_of(rows: Rows, s: jax.Array) -> jax.Array:
    """[*stack, *batch, C] as [*stack, *lead, in]."""
    if rows.groups > 1:
        s = s.reshape(*s.shape[:-1], rows.groups, -1)
    return jnp.repeat(s, _window(rows), axis=-1)
