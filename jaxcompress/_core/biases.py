# SPDX-License-Identifier: Apache-2.0
"""Which parameter is the bias of a site: added to its result after nothing but layout operations.

Arrays of indices take the way that the values take: the numbers of the output channels from the
site, the numbers of its entries from the parameter. Where the two are added they lie side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from . import _compat
from .analyze import CALLS
from .arguments import label_arguments
from .region import Traced
from .sites import Plan, Site

_MOVES = frozenset("reshape transpose broadcast_in_dim squeeze expand_dims copy".split())
_SAME = frozenset("convert_element_type copy stop_gradient name optimization_barrier".split())


class Bias(NamedTuple):
    """The bias of a site.

    Attributes:
      path: key path of the parameter.
      channel: for each of its entries the number of the output channel, int[entries]; of one layer
        where the parameter is stacked over layers.
    """

    path: str
    channel: np.ndarray


class _Tracked(NamedTuple):
    source: Site | str  # a site, or a key path
    index: np.ndarray  # what each value stands for


def biases_of(traced: Traced, args: tuple, kwargs: dict) -> dict[str, Bias]:
    """By name of a site its bias, if it has one that nothing else does not share.

    Output channels are those of `Rows`: what is left of the weight's dimensions, in their order.
    """
    labels, leaves = label_arguments(args, kwargs, (0,))
    paths = iter(leaves)
    jaxpr = traced.staged.jaxpr
    env: dict[Any, _Tracked] = {}
    for v, label in zip(jaxpr.invars, labels, strict=True):
        if label.params:
            path, _ = next(paths)
            env[v] = _Tracked(path, np.arange(max(v.aval.size, 1)).reshape(v.aval.shape))
    found: dict[str, Bias] = {}
    _walk(jaxpr, traced.plan, env, found)
    return found


def _walk(jaxpr: Any, plan: Plan, env: dict[Any, _Tracked], found: dict[str, Bias]) -> None:
    for i, eqn in enumerate(jaxpr.eqns):
        name = eqn.primitive.name
        seen = [None if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
        if i in plan.sites:
            index = _channels(plan.sites[i], eqn.outvars[0].aval.shape)
            if index is not None:
                env[eqn.outvars[0]] = _Tracked(plan.sites[i], index)
        elif name in _SAME and seen and seen[0] is not None:
            env[eqn.outvars[0]] = seen[0]
        elif name in _MOVES and seen[0] is not None:
            moved = eqn.primitive.bind(jnp.asarray(seen[0].index), **_plain(eqn.params))
            env[eqn.outvars[0]] = _Tracked(seen[0].source, np.asarray(moved))
        elif name == "add" and None not in seen:
            _record(seen, found)
        elif name == "scan":
            p, (inner, _) = eqn.params, _compat.open_jaxpr(eqn.params["jaxpr"])
            consts, carry, xs = _compat.split_scan(p, seen)
            layers = [_layer(x) for x in xs]
            given = zip(inner.invars, [*consts, *[None] * len(carry), *layers], strict=True)
            _walk(inner, _inner(plan, i), {v: x for v, x in given if x is not None}, found)
        elif name in CALLS and name not in ("shard_map", "custom_vjp_call"):
            inner, consts = _compat.open_jaxpr(eqn.params[CALLS[name]])
            local = {v: x for v, x in zip(inner.invars, seen, strict=True) if x is not None}
            _walk(inner, _inner(plan, i), local, found)
            for v, out in zip(inner.outvars, eqn.outvars, strict=True):
                if not isinstance(v, Literal) and v in local:
                    env[out] = local[v]


def _inner(plan: Plan, i: int) -> Plan:
    return plan.calls[i][0] if i in plan.calls else Plan()


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    return {**params, "sharding": None} if "sharding" in params else dict(params)


def _layer(x: _Tracked | None) -> _Tracked | None:
    """One slice of a parameter that is stacked over layers, numbered from zero."""
    if x is None or isinstance(x.source, Site) or not x.index.ndim or not len(x.index):
        return None
    first = x.index[0]
    return _Tracked(x.source, np.arange(max(first.size, 1)).reshape(first.shape))


def _channels(site: Site, shape: Sequence[int]) -> np.ndarray | None:
    """For each value of a site's result the number of its output channel."""
    weights = site.weights
    if len(weights) != 1:
        return None
    if site.op == "conv_general_dilated":
        axis = site.params["dimension_numbers"].out_spec[1]
        places, sizes = [axis], [shape[axis]]
    elif site.op == "dot_general":
        (contracted, batch), i = site.params["dimension_numbers"], weights[0]
        free = [len(site.operands[k].shape) - len(contracted[k]) - len(batch[k]) for k in range(2)]
        if batch[0]:
            return None
        start = 0 if i == 0 else free[0]
        places = list(range(start, start + free[i]))
        sizes = [shape[a] for a in places]
    else:
        return None
    number = np.arange(int(np.prod(sizes))).reshape(sizes)
    spread = lax.broadcast_in_dim(jnp.asarray(number), tuple(shape), tuple(places))
    return np.asarray(spread)


def _record(seen: Sequence[Any], found: dict[str, Bias]) -> None:
    sites = [x for x in seen if isinstance(x.source, Site)]
    paths = [x for x in seen if isinstance(x.source, str)]
    if len(sites) != 1 or len(paths) != 1 or sites[0].source.name in found:
        return
    try:
        channel, entry = np.broadcast_arrays(sites[0].index, paths[0].index)
    except ValueError:
        return
    pairs = np.unique(np.stack([entry.ravel(), channel.ravel()]), axis=1)
    if len(np.unique(pairs[0])) == pairs.shape[1]:  # each entry is of one channel
        found[sites[0].source.name] = Bias(paths[0].source, pairs[1])
