# SPDX-License-Identifier: Apache-2.0
"""Rounding to nearest."""

from ._method import Method


def rtn() -> Method:
    """Every weight becomes the nearest number of its format, with the scales of its quantizer.

    Needs no data. What trains with `jc.quantize_aware` computes with these very numbers.

    >>> rtn().name
    'rtn'
    """
    return Method("rtn", round=lambda layer: layer.nearest())
