# SPDX-License-Identifier: Apache-2.0
"""Runs a jaxpr again under whatever trace is current, with a transform applied at its sites.

Ordinary equations are bound unchanged; control flow that contains a chosen site is issued again
through JAX's public functions (`_core/control.py`); everything else is not touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import Literal

from . import _compat
from .sites import Plan


@dataclasses.dataclass
class Runtime:
    """What the sites of one run need and leave behind.

    Attributes:
      transform: the transform.
      settings: by site name, what the transform chose to do there.
      learned: by site name, pytrees that are differentiated (step sizes).
      state: by site name, pytrees that come in and go out (statistics, taps).
    """

    transform: Any
    settings: Mapping[str, Any]
    learned: Mapping[str, Any]
    state: dict[str, Any]

    def child(self, learned: Mapping[str, Any], state: Mapping[str, Any]) -> Runtime:
        """A runtime for the inside of a loop, a branch or a rule."""
        return Runtime(self.transform, self.settings, learned, dict(state))


def pick(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries of these names, as far as they exist."""
    return {n: values[n] for n in sorted(names) if n in values}


def evaluate(
    plan: Plan, jaxpr: Any, consts: Sequence, args: Sequence, runtime: Runtime
) -> list[Any]:
    """Evaluates `jaxpr` with the transform applied at the sites of `plan`.

    Writes new state into `runtime.state`.
    """
    from .control import RULES  # the two modules call each other

    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    last = _last_uses(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        with _compat.equation_scope(eqn):
            if i in plan.sites:
                outs = _apply(plan.sites[i], eqn, values, runtime)
            elif i in plan.calls:
                rule = RULES[eqn.primitive.name]
                outs = rule(eqn, values, plan.calls[i], runtime, plan.extra.get(i))
            else:
                outs = _compat.bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
        for v in last.get(i, ()):
            env.pop(v, None)
    return [read(v) for v in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list]:
    """Variables that no equation after this one reads, so that their values can be freed."""
    kept, out = set(v for v in jaxpr.outvars if not isinstance(v, Literal)), {}
    seen = set()
    for i in range(len(jaxpr.eqns) - 1, -1, -1):
        for v in jaxpr.eqns[i].invars:
            if not isinstance(v, Literal) and v not in seen and v not in kept:
                seen.add(v)
                out.setdefault(i, []).append(v)
    return out


def _apply(site: Any, eqn: Any, values: list, runtime: Runtime) -> list[Any]:
    count = len(site.operands)

    def bind(*operands: Any, **changed: Any) -> Any:
        rest = values[count:]
        out = eqn.primitive.bind(*operands, *rest, **{**eqn.params, **changed})
        return list(out) if eqn.primitive.multiple_results else out

    out, new = runtime.transform.apply(
        site,
        runtime.settings[site.name],
        bind,
        values[:count],
        runtime.learned.get(site.name),
        runtime.state.get(site.name),
    )
    if new is not None:
        runtime.state[site.name] = new
    return list(out) if eqn.primitive.multiple_results else [out]
