# SPDX-License-Identifier: Apache-2.0
"""Solving for each index of leading axes: scanned layers, experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


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
