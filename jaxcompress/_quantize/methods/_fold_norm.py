# SPDX-License-Identifier: Apache-2.0
"""Batch norm with stored statistics becomes part of the layer before it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._method import Method


def fold_norm() -> Method:
    """Multiplies the scale of a batch norm into the weight that it follows.

        gamma (W x + b - mu) / sigma + beta = (gamma / sigma W) x + (beta + gamma (b - mu) / sigma)

    The function computes the same; afterwards `equalization` can act across the two layers. Norms
    that stay are named in the report.

    >>> fold_norm().name
    'fold_norm'

    References: Jacob et al. 2018, section 3.2, equation 14.
    """

    def prepare(job: Any) -> Any:
        from ..._core import channels  # it takes long to import

        found = channels.fold_norm(job.fn)(job.params, *job.inputs.args, **job.inputs.kwargs)
        job.notes.update({site: f"norm not folded: {why}" for site, why in found.kept.items()})
        return dataclasses.replace(job, fn=found.fn, params=found.params)

    return Method("fold_norm", prepare=prepare)
