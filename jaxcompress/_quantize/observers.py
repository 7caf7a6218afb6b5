# SPDX-License-Identifier: Apache-2.0
"""What calibration looks at for each kind of stored range, and what it makes of it.

static     smallest and largest value of all batches, or a histogram of |v|
ema        the average as training would take it
learned    mean|v|, the first step size of LSQ
pact       largest value, the first clipping value
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import histogram, state
from .lsq import initial_step
from .quantizer import Quantizer

_HISTOGRAMS = ("percentile", "mse", "kl")


def start(quantizer: Quantizer, shape: Sequence[int]) -> dict[str, jax.Array]:
    """What is known of an operand before the first batch; `shape` is that of its scales."""
    if quantizer.range == "learned":
        count = jnp.zeros((), jnp.float32)
        return {"total": jnp.zeros(shape, jnp.float32), "count": count}
    if quantizer.observer in _HISTOGRAMS:
        return {**state.blank(shape), **histogram.empty(shape)}
    return state.blank(shape)


def observe(
    quantizer: Quantizer,
    old: dict[str, jax.Array],
    v: jax.Array,
    shared: Sequence[int],
    sync: Sequence[str],
) -> dict[str, jax.Array]:
    """What is known after one more array, float32 and cut by `state.blocked`."""
    if quantizer.range == "learned":
        mean = jnp.mean(jnp.abs(v), shared, keepdims=True)
        mean = lax.pmean(mean, tuple(sync)) if sync else mean
        return {"total": old["total"] + mean, "count": old["count"] + 1}
    one_sided = quantizer.range == "pact"  # what is negative is clipped to 0
    low, high = state.ends_of(v, shared, quantizer.symmetric and not one_sided, sync)
    if quantizer.range == "ema":
        return state.averaged(old, low, high, quantizer.momentum)
    new = {
        "low": jnp.minimum(old["low"], low),
        "high": jnp.maximum(old["high"], high),
        "count": old["count"] + 1,
    }
    if quantizer.observer in _HISTOGRAMS:
        kept = {name: old[name] for name in ("counts", "exponent")}
        new |= histogram.add(kept, v, high, sync)
    return new


def finish(quantizer: Quantizer, seen: dict[str, jax.Array]) -> tuple[Any, Any]:
    """(learned arrays or None, stored range or None) of an operand."""
    if quantizer.range == "learned":
        count = seen["count"].reshape(seen["count"].shape + _ones(seen["total"], seen["count"]))
        return {"step": initial_step(seen["total"] / count, quantizer.format.max)}, None
    if quantizer.range == "pact":
        return {"clip": jnp.where(seen["high"] > 0, seen["high"], 1.0)}, None
    known = {name: seen[name] for name in ("low", "high", "count")}
    if quantizer.observer in _HISTOGRAMS:
        kept = {name: seen[name] for name in ("counts", "exponent")}
        top = histogram.threshold(kept, quantizer.observer or "", quantizer.format)
        known["high"] = jnp.asarray(np.minimum(top, np.asarray(seen["high"])))
        known["low"] = -known["high"]
    return None, known


def _ones(a: jax.Array, b: jax.Array) -> tuple[int, ...]:
    """Axes to add to b so that it broadcasts to a from the left."""
    return (1,) * (a.ndim - b.ndim)
