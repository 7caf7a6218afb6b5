# SPDX-License-Identifier: Apache-2.0
"""How much noise quantization adds: signal and error at the result of every site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core import _compat
from .._core.sites import Site
from .at_site import quantized
from .aware import QuantizeAware


@dataclasses.dataclass(frozen=True)
class Noise(QuantizeAware):
    """Measures signal and noise at the result of every quantized site, without changing it."""

    kind = "noise"
    stateful = True

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """Nothing: what is differentiated inside is not measured, so nothing may be left."""

    def init_state(self, site: Site, setting: Any) -> Any:
        return jnp.zeros(2, jnp.float32)

    def apply(self, site, setting, bind, operands, learned, state):
        out = bind(*operands)
        clean, noisy = (
            jnp.asarray(x[0] if isinstance(x, list) else x, jnp.float32)
            for x in (out, bind(*quantized(site, setting, operands)))
        )
        new = jnp.stack([jnp.sum(clean**2), jnp.sum((noisy - clean) ** 2)])
        split = {a for o in site.operands for s in o.manual or () for a in s}
        axes = tuple(sorted(split | _compat.varying_axes(new)))
        return out, state + (lax.psum(new, axes) if axes else new)


def decibels(state: Mapping[str, jax.Array]) -> dict[str, float]:
    """10 log10(signal / noise) by site name; inf without noise, nothing without a signal."""
    return {name: d for name, power in state.items() if (d := _decibel(power)) is not None}


def _decibel(power: jax.Array) -> float | None:
    signal, noise = (float(v) for v in jnp.sum(power.reshape(-1, 2), 0))
    if signal == 0:
        return None
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
