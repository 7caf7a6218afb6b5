# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest in the range that errs least."""

import dataclasses

from ..quantizer import Quantizer
from ._method import Method


def mse() -> Method:
    """Clip search: the scale is that multiple of max|w| with the least squared error of weights.

        s = f max|w| / max(grid),   f = argmin_f sum (w - Q_f(w))^2,   0.2 <= f <= 2

    Values outside are clipped. Needs no data. Ranges that a recipe says in another way than
    "absmax" (or "minmax", with a zero point), and scales of powers of two, are kept.

    >>> mse().name
    'mse'

    References: Nagel et al. 2021, A White Paper on Neural Network Quantization, section 3.1.
    """
    return Method("mse", round=lambda layer: layer.nearest(searched(layer.weight.quantizer)))


def searched(q: Quantizer) -> Quantizer:
    """The quantizer with the search in place of the largest value, where that decided."""
    if q.range not in ("absmax", "minmax") or q.convention == "signed":
        return q
    return dataclasses.replace(q, range="mse", symmetric=q.symmetric)
