# SPDX-License-Identifier: Apache-2.0
"""Large activations are made smaller and the weights that read them larger."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from ..._solvers.smooth import smooth
from ._method import Method
from ._pairs import channels_of, found_pairs, used


def smoothquant(*, alpha: float = 0.5) -> Method:
    """SmoothQuant: part of the range of activations is moved into the weights, per channel.

        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)        x / s, w s

    The division goes into whatever makes the input: the scale of a norm, a linear layer before, V
    for the output of attention. The function computes the same. Sites whose input cannot be scaled
    are named in the report, with the reason. Convolutions are left alone.

    Args:
      alpha: 0 to 1, how much of the range of activations is moved.

    >>> smoothquant(alpha=0.8).settings
    (('alpha', 0.8),)

    References: Xiao et al. 2022, SmoothQuant, equation 4.
    """

    def prepare(job: Any) -> Any:
        found, sites = found_pairs(job)
        sites = {name: x for name, x in sites.items() if not x[1].convolves}
        wanted = {u.site: ("absmax",) for pair in found.pairs for u in used(pair, sites)}
        if not wanted:
            return job
        seen = job.collect(wanted, "smoothquant")
        scales = {}
        for pair in found.pairs:
            uses = used(pair, sites)
            if not uses:
                continue
            inputs = [
                u.pool(channels_of(sites[u.site][1], seen[u.site]["absmax"], jnp.max)) for u in uses
            ]
            largest = pair.absmax(job.params)
            weights = [largest[member] for member in pair.consumers]
            x, w = (functools.reduce(jnp.maximum, a) for a in (inputs, weights))
            scales[pair] = smooth(x, w, alpha)
        return dataclasses.replace(job, params=found.apply(job.params, scales))

    return Method("smoothquant", prepare=prepare, settings=(("alpha", alpha),))
