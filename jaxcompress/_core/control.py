# SPDX-License-Identifier: Apache-2.0
"""One rule per control-flow primitive: issues it again through JAX's public function.

State of sites is explicit: inside a scan over stacked layers it is stacked and travels with the
scanned values; in other loops it is carried; a branch that is not taken returns it unchanged.
A `QTensor` is passed on where it is only read: what a loop carries or returns is an array.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._errors import SiteError
from . import _compat, fold, qparts, qsharding
from .analyze import CALLS, ORDERS
from .interpret import Runtime, evaluate, pick
from .qtensor import dequantized, is_qtensor
from .sites import Plan

Plans = tuple[Plan, ...]


def _run(jaxpr: Any, plan: Plan, args: Sequence, runtime: Runtime) -> list:
    inner, consts = _compat.open_jaxpr(jaxpr)
    return evaluate(plan, inner, consts, args, runtime)


def _run_to_arrays(jaxpr: Any, plan: Plan, args: Sequence, runtime: Runtime) -> list:
    return _arrays(_run(jaxpr, plan, args, runtime))


def _arrays(values: Sequence) -> list:
    return [dequantized(v) for v in values]


def _names(plans: Plans) -> frozenset[str]:
    return frozenset().union(*(plan.names for plan in plans))


def _zeros(tree: Any) -> Any:
    def zero(x):
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return jnp.zeros_like(x)
        return jnp.zeros(jnp.shape(x), jax.dtypes.float0)

    return jax.tree.map(zero, tree)


def jit(eqn: Any, values: list, plans: Plans, runtime: Runtime, extra: Any) -> list:
    """One jit for all calls of the same jaxpr; explicit shardings are kept."""
    p, plan = eqn.params, plans[0]
    if extra is not None:  # a site in integers that changes: the product of floats in its place
        jaxpr, used = extra
        values = [v for v, u in zip(values, used, strict=True) if u]
        return _run(jaxpr, plan, values, runtime) * 2
    inner, _ = _compat.open_jaxpr(p["jaxpr"])
    names = tuple(s.name for s in plan.everything)

    def constrain(v: Any, sharding: Any) -> Any:
        if _compat.is_unspecified(sharding):
            return v
        if is_qtensor(v):
            v = qsharding.constrain(v, sharding) or v.dequantize()
        return v if is_qtensor(v) else lax.with_sharding_constraint(v, sharding)

    values = [constrain(v, s) for v, s in zip(values, p["in_shardings"], strict=True)]
    outs = runtime.call(
        (id(inner), fold.signature(plan.everything, runtime.settings)),
        names,
        lambda values, runtime: _run(p["jaxpr"], plan, values, runtime),
        values,
        p["name"],
    )
    return [constrain(v, s) for v, s in zip(outs, p["out_shardings"], strict=True)]


def call(eqn: Any, values: list, plans: Plans, runtime: Runtime, _: Any) -> list:
    return _run(eqn.params[CALLS[eqn.primitive.name]], plans[0], values, runtime)


def checkpoint(eqn: Any, values: list, plans: Plans, runtime: Runtime, _: Any) -> list:
    p, names = eqn.params, plans[0].names

    def body(values, learned, state):
        inner = runtime.child(learned, state)
        return _run(p["jaxpr"], plans[0], values, inner), inner.state

    again = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])
    outs, state = again(values, pick(runtime.learned, names), pick(runtime.state, names))
    runtime.state.update(state)
    return outs


def scan(eqn: Any, values: list, plans: Plans, runtime: Runtime, depth: int) -> list:
    p, plan = eqn.params, plans[0]
    consts, carry, xs = _compat.split_scan(p, values)
    carry, k = _arrays(carry), len(carry)
    stop = runtime.transform.stop_at(pick(runtime.learned, plan.names))
    if stop is not None:
        return _until(stop, eqn, consts, carry, xs, plan, runtime)
    xs = [(qparts.stacked(x) or x.dequantize()) if is_qtensor(x) else x for x in xs]
    layered = frozenset(s.name for s in plan.everything if s.layered[depth])
    stacked = plan.names if runtime.transform.collects else layered
    carried = plan.names - stacked
    learned_x = pick(runtime.learned, layered)
    learned_c = pick(runtime.learned, plan.names - layered)

    def body(c, x):
        c, state_c = c
        x, learned_x, state_x = x
        inner = runtime.child({**learned_c, **learned_x}, {**state_c, **state_x})
        outs = _run_to_arrays(p["jaxpr"], plan, [*consts, *c, *x], inner)
        state = inner.state
        return (outs[:k], pick(state, carried)), (outs[k:], pick(state, stacked))

    (c, state_c), (ys, state_y) = lax.scan(
        body,
        (carry, pick(runtime.state, carried)),
        (xs, learned_x, pick(runtime.state, stacked)),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    runtime.state.update({**state_c, **state_y})
    return [*c, *ys]


def _until(
    stop: jax.Array, eqn: Any, consts: list, carry: list, xs: list, plan: Plan, runtime: Runtime
) -> list:
    """A scan whose sites are only those of layer `stop`; later layers are not run.

    Layers before it run as they are, so that one program serves every layer. What the scan stacks
    is zero: whoever asks for one layer looks at its sites alone.
    """
    p, k = eqn.params, len(carry)
    xs = _arrays(xs)

    def at(i: jax.Array) -> list:
        i = p["length"] - 1 - i if p["reverse"] else i
        return [lax.dynamic_index_in_dim(x, i, keepdims=False) for x in xs]

    def step(i: jax.Array, carry: list) -> list:
        return _run_to_arrays(p["jaxpr"], Plan(), [*consts, *carry, *at(i)], runtime)[:k]

    before = p["length"] - 1 - stop if p["reverse"] else stop
    carry = lax.fori_loop(0, before, step, carry)
    inner = runtime.child({}, pick(runtime.state, plan.names))
    outs = _run_to_arrays(p["jaxpr"], plan, [*consts, *carry, *at(before)], inner)
    runtime.state.update(inner.state)
    return [*outs[:k], *[jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[k:]]]


def while_loop(eqn: Any, values: list, plans: Plans, runtime: Runtime, _: Any) -> list:
    p, (test_plan, body_plan) = eqn.params, plans
    n, m = p["cond_nconsts"], p["body_nconsts"]
    test_consts, body_consts, carry = values[:n], values[n : n + m], _arrays(values[n + m :])
    names = _names(plans)
    learned = pick(runtime.learned, names)

    def test(c):
        inner = runtime.child(learned, c[1])  # what the test observes is not kept
        return _run_to_arrays(p["cond_jaxpr"], test_plan, [*test_consts, *c[0]], inner)[0]

    def body(c):
        inner = runtime.child(learned, c[1])
        outs = _run_to_arrays(p["body_jaxpr"], body_plan, [*body_consts, *c[0]], inner)
        return outs, inner.state

    outs, state = lax.while_loop(test, body, (carry, pick(runtime.state, names)))
    runtime.state.update(state)
    return list(outs)


def cond(eqn: Any, values: list, plans: Plans, runtime: Runtime, _: Any) -> list:
    names = _names(plans)

    def branch(jaxpr: Any, plan: Plan) -> Callable:
        def f(args, learned, state):
            inner = runtime.child(learned, state)
            return _run_to_arrays(jaxpr, plan, args, inner), inner.state

        return f

    branches = [branch(j, q) for j, q in zip(eqn.params["branches"], plans, strict=True)]
    learned, state = pick(runtime.learned, names), pick(runtime.state, names)
    operands = (values[1:], learned, state)
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        outs, state = lax.switch(values[0], branches, *operands)
    else:  # made by lax.platform_dependent: only one branch is lowered
        kept = list(zip(platforms, branches, strict=True))
        default = next((f for names, f in kept if names is None), None)
        special = {name: f for names, f in kept for name in names or ()}
        outs, state = lax.platform_dependent(*operands, default=default, **special)
    runtime.state.update(state)
    return list(outs)


def custom_jvp(eqn: Any, values: list, plans: Plans, runtime: Runtime, _: Any) -> list:
    """The primal is transformed; the tangent comes from the user's own rule, untouched."""
    p, names = eqn.params, plans[0].names
    skip = p["num_consts"]

    @jax.custom_jvp
    def f(args, learned, state):
        inner = runtime.child(learned, state)
        return _run_to_arrays(p["call_jaxpr"], plans[0], list(args), inner), inner.state

    @f.defjvp
    def rule(primals, tangents):
        out = f(*primals)
        jaxpr, consts, zeros = _compat.call_jvp_rule(p, len(values))
        args = _arrays(primals[0])
        pairs = zip(values, args, tangents[0], strict=True)
        inputs = (*args[skip:], *[_zeros(a) if is_qtensor(v) else t for v, a, t in pairs][skip:])
        results = _compat.eval_jaxpr(jaxpr, consts, *inputs)
        nonzero = iter(results[len(zeros) :])
        dots = [_zeros(y) if zero else next(nonzero) for y, zero in zip(out[0], zeros, strict=True)]
        return out, (dots, _zeros(out[1]))

    outs, state = f(tuple(values), pick(runtime.learned, names), pick(runtime.state, names))
    runtime.state.update(state)
    return list(outs)


def custom_vjp(eqn: Any, values: list, plans: Plans, runtime: Runtime, rule: Any) -> list:
    """The primal and the user's forward rule are transformed; the backward rule is kept."""
    p, names = eqn.params, _names(plans)
    skip, count = p["num_consts"], len(eqn.outvars)
    places = {v: k for k, v in enumerate(eqn.invars) if k < skip}
    if not names:  # entered for a QTensor that it reads
        with _compat.classic_custom_rules():
            rule = _compat.call_forward_rule(p, len(values))

    @jax.custom_vjp
    def f(args, learned, state):
        inner = runtime.child(learned, state)
        return _run_to_arrays(p["call_jaxpr"], plans[0], list(args), inner), inner.state

    def closed_over(value: Any, args: tuple) -> Any:
        """A value of the function around, which the primal reads too: an argument here."""
        variable = _compat.traced_variable(value)
        if variable is None:
            return value
        if variable not in places:
            raise SiteError(
                f"the forward rule of the custom_vjp at {_compat.source_line(eqn)} closes over a "
                "traced value that the function itself does not read. Pass it as an argument."
            )
        return args[places[variable]]

    def forward(args, learned, state):
        if rule is None:
            raise SiteError(
                f"the forward rule of the custom_vjp at {_compat.source_line(eqn)} calls the "
                f"function itself, and it was differentiated more than {ORDERS} times."
            )
        inner = runtime.child(learned, state)
        leading = [closed_over(value, args) for value in rule.leading]
        outs = _run_to_arrays(rule.jaxpr, plans[1], [*leading, *args[skip:]], inner)
        made, outs = iter(outs[: len(outs) - count]), outs[len(outs) - count :]
        kept = _compat.forwarded_residuals(p)
        residuals = [next(made) if k is None else dequantized(args[k]) for k in kept]
        return (outs, inner.state), (residuals, args, learned, state)

    def backward(saved, cotangents):
        residuals, args, learned, state = saved
        grads = _compat.call_backward_rule(p, residuals, cotangents[0])
        grads = [None if is_qtensor(x) else g for x, g in zip(args[skip:], grads, strict=True)]
        return ((None,) * skip + tuple(grads), _zeros(learned), _zeros(state))

    f.defvjp(forward, backward)
    outs, state = f(tuple(values), pick(runtime.learned, names), pick(runtime.state, names))
    runtime.state.update(state)
    return list(outs)


def shard_map(eqn: Any, values: list, plans: Plans, runtime: Runtime, _: Any) -> list:
    p, plan = eqn.params, plans[0]
    replicated = PartitionSpec()

    def body(values, learned, state):
        inner = runtime.child(learned, state)
        return _run_to_arrays(p["jaxpr"], plan, values, inner), inner.state

    values, in_specs = list(values), list(p["in_specs"])
    for i, (v, spec) in enumerate(zip(values, in_specs, strict=True)):
        if is_qtensor(v):
            in_specs[i] = qsharding.partition(v, spec, dict(p["mesh"].shape))
            if in_specs[i] is None:
                values[i], in_specs[i] = v.dequantize(), spec
    learned, state = pick(runtime.learned, plan.names), pick(runtime.state, plan.names)
    sites = {s.name: s for s in plan.everything}
    specs = {n: runtime.transform.state_spec(sites[n], v) for n, v in state.items()}
    outs, state = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=(in_specs, jax.tree.map(lambda _: replicated, learned), specs),
        out_specs=(list(p["out_specs"]), specs),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )(values, learned, state)
    runtime.state.update(state)
    return list(outs)


RULES: dict[str, Callable] = {
    "jit": jit,
    "pjit": jit,
    "closed_call": call,
    "core_call": call,
    "remat2": checkpoint,
    "checkpoint": checkpoint,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "shard_map": shard_map,
}
