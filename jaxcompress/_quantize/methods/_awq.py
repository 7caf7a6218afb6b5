# SPDX-License-Identifier: Apache-2.0
"""Weights that read large activations are scaled up before they are rounded."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..._core.qtensor import QTensor
from ..._solvers.awq import scale_of
from ..._solvers.clip import clip
from ..._solvers.rounder import find_scales, round_to
from ..rounder import QuantizerRounder
from ..weights import weights_of
from ._method import Layer, Method
from ._pairs import channels_of, found_pairs, inputs_of, used


def awq(*, ratios: int = 20, clipping: bool = True) -> Method:
    """AWQ: scales of input channels, and a clip search, for the least error of the outputs.

        s = a^r / sqrt(max a^r min a^r),  a = mean|x|      x / s, w s
        r = argmin of sum ||W x - (Q(W s) / s) x||^2 over r in 0, 1/n, ... (n - 1)/n

    The error is exact, over all tokens, by the Gram matrix of the inputs; it is that of the layers
    that read the scaled input, not of the whole block. Before another method that rounds
    (`["awq", "gptq"]`) only the scales are used.

    Args:
      ratios: n, how many r are tried.
      clipping: whether ranges are searched, where this method rounds.

    >>> awq().needs
    ('gram',)

    References: Lin et al. 2023, AWQ, equations 4 and 5 and the published `auto_clip.py`.
    """

    def round(layer: Layer) -> QTensor:
        if not clipping:
            return layer.nearest()
        w, size, rounder = layer.w, layer.group_size, QuantizerRounder(layer.weight.quantizer)
        extent = clip(w, rounder, group_size=size, importance=layer.statistics["gram"])
        extent = jnp.repeat(extent, size or w.shape[-1], axis=-1)[..., : w.shape[-1]]
        w = jnp.clip(w, -extent, extent)
        s = find_scales(w, rounder, group_size=size)
        codes, _ = round_to(w, rounder, s, group_size=size)
        return layer.packed(codes, s.scale, s.zero_point, s.global_scale)

    prepare = functools.partial(_prepare, ratios=ratios)
    settings = (("ratios", ratios), ("clipping", clipping))
    return Method("awq", prepare=prepare, round=round, needs=("gram",), settings=settings)


def _prepare(job: Any, ratios: int) -> Any:
    found, sites = found_pairs(job)
    wanted = {u.site: ("gram", "magnitude") for p in found.pairs for u in used(p, sites)}
    if not wanted:
        return job
    seen = job.collect(wanted, "awq")

    known, _ = weights_of(job.trace(), job.parameters())
    parameters = job.parameters()
    layers: dict[str, Layer] = {}
    for path, weight in known.items():
        site = weight.uses[0][0]
        if site.name in wanted and len(weight.uses) == 1:
            v, _ = weight.read(parameters[path])
            layer = Layer(site.name, weight, v, sites[site.name][1], seen[site.name])
            if layer.solvable():
                layers[site.name] = layer
    scales = {}
    for pair in found.pairs:
        uses = used(pair, layers)
        if not uses:
            continue
        pooled = [
            u.pool(channels_of(sites[u.site][1], seen[u.site]["magnitude"], jnp.mean), "mean")
            for u in uses
        ]
        scales[pair] = _best(pair, uses, layers, functools.reduce(jnp.maximum, pooled), ratios)
    return dataclasses.replace(job, params=found.apply(job.params, scales))


def _best(pair: Any, uses: Any, layers: Any, magnitude: jax.Array, ratios: int) -> jax.Array:
    """The scale with the least error, chosen for each layer of a stack on its own."""
    best = jnp.ones_like(magnitude)
    least = jnp.full(pair.layers, jnp.inf)
    for k in range(ratios):
        s = jnp.apply_along_axis(scale_of, -1, magnitude, k / ratios)
        losses = [_loss_of(pair, use, layers[use.site], s) for use in uses]
        total = functools.reduce(jnp.add, losses)
        best = jnp.where((total < least)[..., None], s, best)
        least = jnp.minimum(total, least)
    return best


def _loss_of(pair: Any, use: Any, layer: Layer, s: jax.Array) -> jax.Array:
    """The error of the outputs of a site under a scale, one for each layer that s has."""
    w = layer.w
    assert layer.rows is not None
    spread = inputs_of(layer.rows, use.spread(s))
    rounder, size = QuantizerRounder(layer.weight.quantizer), layer.group_size
    loss = _loss(w, layer.statistics["gram"], spread, rounder, size)
    return loss.reshape(*pair.layers, -1).sum(-1)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _loss(w: Any, gram: Any, s: Any, rounder: Any, size: int | None) -> jax.Array:
    v = w * s[..., None, :]
    _, q = round_to(v, rounder, find_scales(v, rounder, group_size=size), group_size=size)
    d = q / s[..., None, :] - w
    return jnp.einsum("...oi,...ij,...oj->...", d, gram, d)
