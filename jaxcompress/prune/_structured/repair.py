# SPDX-License-Identifier: Apache-2.0
"""Repair: the sites that read a group take over what they lose, in closed form.

With K the inputs that stay, G = sum x xᵀ, m = E[x] over the calibration tokens:

    least squares   W' = argmin sum ||W x - W' x_K||² = W G[:, K] (G[K, K] + λ I)⁻¹
    with a bias     the same of x - m, and b' = b + W m - W' m_K
    bias only       b' = b + W[:, not K] m[not K]
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.biases import Bias, biases_of
from ..._core.channels.kept import Kept
from ..._core.channels.terms import find
from ..._solvers.refit import refit
from .consumers import Consumer, reading, statistics
from .problem import Problem
from .weights import parameter, site_weight, written

if TYPE_CHECKING:
    from ..._core.channels.terms import Leaf


def repaired(
    problem: Problem, kept: Mapping[Leaf, np.ndarray], how: str, notes: dict[str, str]
) -> Problem:
    """The problem with other weights at the sites that lose inputs.

    Args:
      notes: by name of a site, why it stayed as it was; filled here.
    """
    sites = reading(problem, list(kept))
    biases = biases_of(problem.graph.traced, (problem.params, *problem.inputs), {})
    shared = collections.Counter(bias.path for bias in biases.values())
    uses = collections.Counter(c.site.operands[c.rows.weight].path for c, _ in sites.values())
    found: dict[str, tuple[Consumer, Bias | None]] = {}
    for name, (consumer, _) in sites.items():
        path, bias = consumer.site.operands[consumer.rows.weight].path, biases.get(name)
        bias = bias if bias is not None and shared[bias.path] == 1 else None
        if site_weight(problem, consumer) is None:
            notes[name] = "its weight is computed, not a parameter as a whole"
        elif uses[path] > 1 or _read_elsewhere(problem, path, name):
            notes[name] = "several sites read its weight"
        elif how == "bias" and (bias is None or consumer.lead):
            notes[name] = "no bias of its own"
        else:
            found[name] = consumer, None if consumer.lead else bias
    if not found:
        return problem
    statistic = ("gram", "mean", "count") if how == "least_squares" else ("mean",)
    seen = statistics(problem, list(found), statistic, "repair")
    arrays = [*problem.arrays]
    small = Kept(kept, problem.layers)
    for name, (consumer, bias) in found.items():
        w = site_weight(problem, consumer)
        stack = consumer.site.stack
        stays = _stays(problem, consumer, small)
        new, shift = _solved(w, seen[name], stays, how, bias is not None, len(stack))
        if how == "least_squares":
            arrays[parameter(problem, consumer)] = written(problem, consumer, new)
        if bias is not None:
            k = problem.graph.paths.index(bias.path)
            b = arrays[k]
            shift = shift.reshape(*stack, -1)[..., bias.channel].reshape(b.shape)
            arrays[k] = (b + shift).astype(b.dtype)
    call, _ = problem.tree.split(problem.params)
    params = problem.tree.merge(call, arrays)
    return dataclasses.replace(problem, arrays=arrays, params=params)


def _read_elsewhere(problem: Problem, path: str, name: str) -> bool:
    return any(
        site.name != name and path in operand.path.split("+")
        for site in problem.graph.sites
        for operand in site.operands
    )


def _stays(problem: Problem, consumer: Consumer, small: Kept) -> np.ndarray:
    """bool[*stack, in]: the inputs that are kept."""
    size, stack = consumer.inputs.size, consumer.site.stack
    out = np.zeros((*stack, size), bool)
    layers = {find(x) for x in small.layer.values()}
    axis = next((k for k, t in enumerate(consumer.layers) if find(t) in layers), None)
    for index in np.ndindex(*stack):
        layer = index[axis] if axis is not None else 0
        out[index][small.positions(consumer.inputs, layer)] = True
    return out


def _solved(
    w: Any, seen: Mapping[str, Any], stays: np.ndarray, how: str, has_bias: bool, stack: int
) -> tuple[jax.Array, jax.Array]:
    """(rows of the new weight, what is added to the bias), stacked as w is."""
    w = w.astype(jnp.float32)
    kept = jnp.asarray(stays)
    lead = w.ndim - 2 - stack
    kept = kept.reshape(*kept.shape[:-1], *(1,) * lead, kept.shape[-1])
    kept = jnp.broadcast_to(kept, (*w.shape[:-2], w.shape[-1]))
    if how == "bias":
        lost = jnp.where(kept[..., None, :], 0, w)
        return w, jnp.einsum("...oi,...i->...o", lost, seen["mean"])
    if not has_bias:
        return refit(w, seen["gram"], kept), jnp.zeros(w.shape[:-1])
    mean = seen["mean"]
    outer = mean[..., :, None] * mean[..., None, :] * seen["count"][..., None, None]
    new = refit(w, seen["gram"] - outer, kept)
    return new, jnp.einsum("...oi,...i->...o", w - new, mean)
