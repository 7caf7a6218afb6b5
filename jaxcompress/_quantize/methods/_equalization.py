# SPDX-License-Identifier: Apache-2.0
"""The channels of two layers get equal ranges."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from ..._solvers.equalize import equalize
from ._method import Method
from ._pairs import found_pairs, used


def equalization(*, sweeps: int = 10) -> Method:
    """Cross-layer equalization: output channels of one layer against input channels of the next.

        s_i = sqrt(max|W1_i| / max|W2_i|)        W1_i / s_i, b1_i / s_i, W2_i s_i

    Between layers with nothing but ReLU-like, layout and pooling operations between them. The
    function computes the same. Needs no data. Chains are swept until little changes.

    Args:
      sweeps: how often all pairs are equalized.

    >>> equalization().name
    'equalization'

    References: Nagel et al. 2019, Data-Free Quantization, section 4.1, equation 11.
    """

    def prepare(job: Any) -> Any:
        found, sites = found_pairs(job)
        weights = {s.operands[rows.weight].path for s, rows, _ in sites.values()}
        params = job.params
        for _ in range(sweeps):
            for pair in found.pairs:
                makers = [m for m in pair.producers if m.path in weights]
                if not makers or not used(pair, sites):
                    continue
                largest = pair.absmax(params)
                first, second = (
                    functools.reduce(jnp.maximum, [largest[m] for m in members])
                    for members in (makers, pair.consumers)
                )
                params = pair.apply(params, equalize(first, second))
        return dataclasses.replace(job, params=params)

    return Method("equalization", prepare=prepare)
