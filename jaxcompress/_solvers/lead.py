# SPDX-License-Identifier: Apache-2.0
"""Solving for each index of leading axes (scanned layers, experts), and for panels of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

_PANEL = 512  # outputs; with 1024 inputs that is 2 MiB


def over_lead(fn: Callable, axes: int) -> Callable:
    """Returns fn for arguments that all have so many leading axes more, and so its results.

    One index after the other on a CPU, where that is as fast and needs the memory of one; side by
    side elsewhere, where the small steps of one leave the device idle.
    """

    def run(*args: Any) -> Any:
        if not axes:
            return fn(*args)
        lead = jax.tree.leaves(args)[0].shape[:axes]
        flat = jax.tree.map(lambda a: a.reshape(math.prod(lead), *a.shape[axes:]), args)
        if jax.default_backend() == "cpu":
            out = lax.map(lambda a: fn(*a), flat)
        else:
            out = jax.vmap(fn)(*flat)
        return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), out)

    return run


def over_outputs(fn: Callable, together: bool) -> Callable:
    """Returns fn for arguments whose first axis are outputs, and so its results.

    Outputs are independent of each other, unless they are said to belong together. On a CPU they go
    in panels that fit a cache.
    """

    def run(*args: Any) -> Any:
        out = jax.tree.leaves(args)[0].shape[0]
        panel = divisor(out, _PANEL)
        if together or panel == out or panel < _PANEL // 4 or jax.default_backend() != "cpu":
            return fn(*args)
        cut = jax.tree.map(lambda a: a.reshape(out // panel, panel, *a.shape[1:]), args)
        done = lax.map(lambda a: fn(*a), cut)
        return jax.tree.map(lambda a: a.reshape(out, *a.shape[2:]), done)

    return run


def divisor(n: int, most: int) -> int:
    """Returns the largest divisor of n that is at most so much.

    >>> divisor(100, 8)
    5
    """
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
