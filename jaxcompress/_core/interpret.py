# SPDX-License-Identifier: Apache-2.0
"""Runs a jaxpr again under whatever trace is current, with a transform applied at its sites.

Ordinary equations are bound unchanged; control flow that contains a chosen site is issued again
through JAX's public functions (`_core/control.py`); everything else is not touched. What repeats
is evaluated once and called (`_core/fold.py`).

A value may be a `QTensor` where the jaxpr has an array. Layout primitives move it as it is, control
flow carries it, and whatever else reads it computes the array right there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from . import _compat, fold, qlayout
from .qtensor import QTensor, abstract, dequantized, is_qtensor
from .sites import Plan, Site


@dataclasses.dataclass
class Runtime:
    """What the sites of one run need and leave behind.

    Attributes:
      transform: the transform.
      settings: by site name, what the transform chose to do there.
      learned: by site name, pytrees that are differentiated (step sizes).
      state: by site name, pytrees that come in and go out (statistics, taps).
      calls: functions made for what is called more than once.
    """

    transform: Any
    settings: Mapping[str, Any]
    learned: Mapping[str, Any]
    state: dict[str, Any]
    calls: dict[Any, tuple[Callable, Sequence[str]]] = dataclasses.field(default_factory=dict)

    def child(self, learned: Mapping[str, Any], state: Mapping[str, Any]) -> Runtime:
        """A runtime for the inside of a loop, a branch or a rule."""
        return Runtime(self.transform, self.settings, learned, dict(state), self.calls)

    def call(
        self,
        key: Any,
        names: Sequence[str],
        body: Callable[[Sequence, Runtime], list],
        values: Sequence,
        label: str,
    ) -> list:
        """Calls `body(values, runtime)` through a jit that all calls with this key share.

        `names` are the sites of this call; the first call's `body` serves all of them, so their
        number and order must be those of its own sites.
        """
        if key not in self.calls:

            def shared(values, learned, state):
                inner = self.child(learned, state)
                return body(values, inner), inner.state

            shared.__name__ = shared.__qualname__ = label
            self.calls[key] = jax.jit(shared), names
        function, known = self.calls[key]
        pairs = list(dict.fromkeys(zip(known, names, strict=True)))
        learned = {a: self.learned[b] for a, b in pairs if b in self.learned}
        state = {a: self.state[b] for a, b in pairs if b in self.state}
        outs, new = function(values, learned, state)
        self.state.update({b: new[a] for a, b in pairs if a in new})
        return outs


def pick(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The entries of these names, as far as they exist."""
    return {n: values[n] for n in sorted(names) if n in values}


def evaluate(
    plan: Plan, jaxpr: Any, consts: Sequence, args: Sequence, runtime: Runtime
) -> list[Any]:
    """Evaluates `jaxpr` with the transform applied at the sites of `plan`.

    Writes new state into `runtime.state`. Arguments and results may be QTensors.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    steps = fold.schedule(plan, jaxpr, runtime.settings)
    _run(steps, env, plan, jaxpr, runtime)
    return [_read(env, v) for v in jaxpr.outvars]


def _read(env: dict, v: Any) -> Any:
    return v.val if isinstance(v, Literal) else env[v]


def _run(steps: Sequence, env: dict, plan: Plan, jaxpr: Any, runtime: Runtime) -> None:
    from .control import RULES  # the two modules call each other

    for step in steps:
        if isinstance(step, fold.Block):
            outs = _call_block(step, env, plan, jaxpr, runtime)
            env.update(zip(step.outputs, outs, strict=True))
            continue
        eqn = jaxpr.eqns[step]
        values = [_read(env, v) for v in eqn.invars]
        carries = any(map(is_qtensor, values))
        with _compat.equation_scope(eqn):
            if step in plan.sites:
                outs = _apply(plan.sites[step], eqn, values, runtime)
            elif step in plan.calls or (carries and eqn.primitive.name in RULES):
                rule, plans = RULES[eqn.primitive.name], plan.calls.get(step) or _no_sites(eqn)
                outs = rule(eqn, values, plans, runtime, plan.extra.get(step))
            else:
                outs = qlayout.bind(eqn, values, functools.partial(_compat.bind, eqn))
        env.update(zip(eqn.outvars, outs, strict=True))


def _no_sites(eqn: Any) -> tuple[Plan, ...]:
    """Plans for the jaxprs of an equation that is entered only for the QTensors that it reads."""
    return (Plan(),) * len(eqn.params.get("branches", (0, 0)))


def _call_block(block: fold.Block, env: dict, plan: Plan, jaxpr: Any, runtime: Runtime) -> list:
    def body(values: Sequence, inner: Runtime) -> list:
        local = dict(zip(block.inputs, values, strict=True))
        _run(range(block.start, block.start + block.length), local, plan, jaxpr, inner)
        return [local[v] for v in block.outputs]

    return runtime.call(
        (id(jaxpr), block.model, block.length, block.signature),
        block.sites,
        body,
        [env[v] for v in block.inputs],
        "jaxcompress_block",
    )


class Operation(NamedTuple):
    """The operation of a site, as a function of the operands that matter.

    Attributes:
      eqn: its equation.
      rest: operands that do not matter (group sizes, indices).
    """

    eqn: Any
    rest: tuple

    def __call__(self, *operands: Any, **changed: Any) -> Any:
        primitive, params = self.eqn.primitive, {**self.eqn.params, **changed}

        def run(values: list) -> list:
            out = primitive.bind(*values, **params)
            return list(out) if primitive.multiple_results else [out]

        outs = qlayout.bind(self.eqn, [*operands, *self.rest], run, params)
        return outs if primitive.multiple_results else outs[0]


def _apply(site: Site, eqn: Any, values: list, runtime: Runtime) -> list[Any]:
    count = len(site.operands)
    for i, operand in enumerate(site.operands):
        if not (runtime.transform.takes_packed and operand.role == "weight"):
            values[i] = dequantized(values[i])
    out, new = runtime.transform.apply(
        site,
        runtime.settings[site.name],
        Operation(eqn, tuple(values[count:])),
        values[:count],
        runtime.learned.get(site.name),
        runtime.state.get(site.name),
    )
    if new is not None:
        runtime.state[site.name] = new
    return list(out) if eqn.primitive.multiple_results else [out]


def apply(fn: Callable, q: QTensor) -> Any:
    """`fn(q)`, where `fn` is a function of an array; a QTensor if it only moves values."""
    jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(fn)(abstract(q)))
    return evaluate(Plan(), jaxpr, consts, [q], Runtime(None, {}, {}, {}))[0]
