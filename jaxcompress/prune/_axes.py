# SPDX-License-Identifier: Apache-2.0
"""Along which axis of a parameter its matmul or convolution sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._core.sites import Site
from .._core.transform import Transform, Transformed
from .._errors import SiteError


@dataclasses.dataclass(frozen=True)
class Varies(Transform):
    """Returns, as the state of a site, along which dimensions its weight varies."""

    kind = "varies"
    stateful = True

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        plain = ("dot_general", "conv_general_dilated")
        chosen = [s for s in sites if s.op in plain and not s.opaque and len(s.weights) == 1]
        return {s.name: s.weights[0] for s in chosen if "+" not in s.operands[s.weights[0]].path}

    def init_state(self, site: Site, setting: int) -> Any:
        return jnp.zeros(len(site.operands[setting].shape), bool)

    def apply(self, site, setting, bind, operands, learned, state):
        w = operands[setting]
        varies = [jnp.any(w != jax.lax.slice_in_dim(w, 0, 1, axis=d)) for d in range(w.ndim)]
        return bind(*operands), jnp.stack(varies)


def contracted_axes(fn: Callable, *, argnums: int = 0) -> Callable[..., dict[str, int]]:
    """Finds the axis of inputs of every parameter that a matmul or convolution reads.

    Each axis is numbered through, in all parameters at once, and seen at the sites: through
    transposes, reshapes, casts and scans over layers. Of several contracted axes it is the axis of
    input channels for a convolution, else the last one.

    Args:
      fn: a forward pass or loss; not a train step.
      argnums: position of the argument that holds the parameters.

    Returns:
      A function of the arguments of `fn` that returns {key path: axis, negative}, for
      `jc.prune.nm(axis=...)`. It runs `fn` once for every axis that a parameter can have.

    Raises:
      SiteError: (when called) two sites sum over different axes of one parameter.

    >>> fn = lambda p, x: (x @ p["w"].T) @ p["v"]
    >>> contracted_axes(fn)({"w": jnp.ones((8, 4)), "v": jnp.ones((8, 2))}, jnp.ones((1, 4)))
    {'v': -2, 'w': -1}
    """
    inner = Transformed(fn, Varies(), argnums)

    def find(*args: Any, **kwargs: Any) -> dict[str, int]:
        traced = inner.trace(*args, **kwargs)
        place = argnums % len(args)
        ranks = {path: len(x.shape) for path, x in traced.leaves}
        _, state = inner.init(*args, **kwargs)
        seen = []
        for axis in range(-max(ranks.values(), default=0), 0):
            numbered = jax.tree.map(lambda x, axis=axis: _numbered(x, axis), args[place])
            changed = (*args[:place], numbered, *args[place + 1 :])
            seen.append((axis, jax.jit(lambda *a: inner.call({}, state, a, kwargs)[1])(*changed)))
        found: dict[str, tuple[int, str]] = {}
        for site in traced.plan.everything:
            i = traced.settings[site.name]
            path, contracted = site.operands[i].path, list(site.contracting(i))
            first = contracted[:1] if site.op.startswith("conv") else contracted
            axes = [
                axis
                for axis, states in seen
                if axis >= -ranks[path]
                and any(bool(jnp.any(states[site.name][..., d])) for d in first)
            ]
            if not axes:
                continue
            other, name = found.setdefault(path, (axes[-1], site.name))
            if other != axes[-1]:
                raise SiteError(
                    f"`{name}` sums over axis {other} of `{path}` and `{site.name}` over axis "
                    f"{axes[-1]}: no axis suits both. Choose one with axis={{...}}, or leave it "
                    f'out with exclude="{path}".'
                )
        return {path: axis for path, (axis, _) in sorted(found.items())}

    return find


def _numbered(x: Any, axis: int) -> Any:
    """The positions along an axis, in the shape of x; zeros where there is no such axis."""
    if not hasattr(x, "shape") or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if len(x.shape) < -axis:
        return jnp.zeros(x.shape, x.dtype)
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, len(x.shape) + axis).astype(x.dtype)
