# SPDX-License-Identifier: Apache-2.0
"""Calls and control flow of the smaller function, issued again through JAX's public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._errors import SiteError
from .. import _compat
from .graph import Node, Walk, equate
from .terms import Dims, pinned

if TYPE_CHECKING:
    from .emit import Emit


def _jit(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    def call(*args):
        return emit.run(n.subs[i][0], args)

    call.__name__ = call.__qualname__ = eqn.params["name"]
    return jax.jit(call)(*values)


def _call(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    return emit.run(n.subs[i][0], values)


def _checkpoint(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    p = eqn.params
    again = jax.checkpoint(
        lambda *args: emit.run(n.subs[i][0], args), prevent_cse=p["prevent_cse"], policy=p["policy"]
    )
    return again(*values)


def _scan(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    p, body = eqn.params, n.subs[i][0]
    consts, carry, xs = _compat.split_scan(p, values)
    k = len(carry)

    def step(c, x):
        outs = emit.run(body, [*consts, *c, *x])
        return outs[:k], outs[k:]

    length = emit.kept.size(body.layers[-1])
    c, ys = lax.scan(step, carry, xs, length=length, reverse=p["reverse"], unroll=p["unroll"])
    return [*c, *ys]


def _while(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    a = eqn.params["cond_nconsts"]
    b = a + eqn.params["body_nconsts"]
    test, body = n.subs[i]
    return lax.while_loop(
        lambda c: emit.run(test, [*values[:a], *c])[0],
        lambda c: emit.run(body, [*values[a:b], *c]),
        values[b:],
    )


def _cond(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    branches = [lambda *args, sub=sub: emit.run(sub, args) for sub in n.subs[i]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return lax.switch(values[0], branches, *values[1:])
    kept = list(zip(platforms, branches, strict=True))
    default = next((f for names, f in kept if names is None), None)
    special = {name: f for names, f in kept for name in names or ()}
    return lax.platform_dependent(*values[1:], default=default, **special)


def _shard_map(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    p = eqn.params
    body = jax.shard_map(
        lambda *args: emit.run(n.subs[i][0], args),
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=list(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return list(body(*values))


# ------------------------------------------------------------------ custom derivatives


def _zeros(x: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return jnp.zeros_like(x)
    return jnp.zeros(jnp.shape(x), jax.dtypes.float0)


def _custom_jvp(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    """The user's rule, with smaller arrays too."""
    p, skip = eqn.params, eqn.params["num_consts"]

    @jax.custom_jvp
    def f(*args):
        return emit.run(n.subs[i][0], args)

    @f.defjvp
    def rule(primals, tangents):
        out = f(*primals)
        with _compat.classic_custom_rules():
            jaxpr, consts, zero = _compat.call_jvp_rule(p, len(values))
        dims = [n.of(v) for v in eqn.invars[skip:]]
        own = _Rule(emit, eqn)
        node, results = own.walk(jaxpr, consts, [*dims, *dims])
        own.same([n.of(v) for v in eqn.outvars], results[: len(zero)])
        found = emit.run(node, [*primals[skip:], *tangents[skip:]])
        nonzero = iter(found[len(zero) :])
        return out, [_zeros(y) if z else next(nonzero) for y, z in zip(out, zero, strict=True)]

    return f(*values)


def _custom_vjp(emit: Emit, n: Node, i: int, eqn: Any, values: list) -> list:
    """The user's two rules, with smaller arrays too."""
    p, skip, count = eqn.params, eqn.params["num_consts"], len(eqn.outvars)
    dims, own = [n.of(v) for v in eqn.invars[skip:]], _Rule(emit, eqn)
    held: list[list[Dims]] = []  # of the residuals

    @jax.custom_vjp
    def f(*args):
        return emit.run(n.subs[i][0], args)

    def forward(*args):
        with _compat.classic_custom_rules():
            rule = _compat.call_forward_rule(p, len(values))
        lead = [own.constant(c) for c in rule.leading]
        node, results = own.walk(rule.jaxpr, (), [*lead, *dims])
        own.same([n.of(v) for v in eqn.outvars], results[len(results) - count :])
        outs = emit.run(node, [*rule.leading, *args[skip:]])
        places = _compat.forwarded_residuals(p)
        made, of = iter(outs), iter(results)
        residuals = [next(made) if k is None else args[k] for k in places]
        held[:] = [[next(of) if k is None else n.of(eqn.invars[k]) for k in places]]
        return outs[len(outs) - count :], (residuals, [_zeros(x) for x in args[:skip]])

    def backward(saved, cotangents):
        residuals, zeros = saved
        avals = [
            *(jax.ShapeDtypeStruct([t.size for t in d], x.dtype) for d, x in zip(*held, residuals)),
            *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars),
        ]
        missing: list[bool] = []

        def rule(*args):
            k = len(residuals)
            found = _compat.call_backward_rule(p, list(args[:k]), list(args[k:]))
            found = [None if getattr(g, "dtype", 0) == jax.dtypes.float0 else g for g in found]
            missing[:] = [g is None for g in found]
            return [g for g in found if g is not None]

        jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(rule)(*avals))
        node, results = own.walk(jaxpr, consts, [*held[0], *(n.of(v) for v in eqn.outvars)])
        own.same([d for d, m in zip(dims, missing) if not m], results)
        grads = iter(emit.run(node, [*residuals, *cotangents]))
        return (*zeros, *(None if m else next(grads) for m in missing))

    f.defvjp(forward, backward)
    return f(*values)


class _Rule:
    """Terms of a derivative rule, which is looked at when it is differentiated.

    It may not take apart or pin an axis that lost indices: these were chosen without it.
    """

    def __init__(self, emit: Emit, eqn: Any):
        self.emit, self.eqn = emit, eqn

    def walk(self, jaxpr: Any, consts: Sequence, ins: Sequence[Dims]) -> tuple[Node, list[Dims]]:
        from ..sites import Plan

        inner, own = _compat.open_jaxpr(jaxpr)
        found = Walk().run(inner, list(consts) or own, Plan(), ins)
        self._check()
        return found

    def same(self, xs: Sequence[Dims], ys: Sequence[Dims]) -> None:
        equate(xs, ys)
        self._check()

    def constant(self, x: Any) -> Dims:
        return pinned(jnp.shape(x), "what a derivative rule closes over")

    def _check(self) -> None:
        x = self.emit.kept.settle()
        if x is not None:
            why = x.pin or f"it takes an axis of size {x.size} apart"
            raise SiteError(
                "the derivative rule of the custom function at "
                f"{_compat.source_line(self.eqn)} cannot be made smaller: {why}. The small "
                "function can be evaluated, but not differentiated there."
            )


RULES: dict[str, Callable[[Any, Node, int, Any, list], list]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _checkpoint,
    "checkpoint": _checkpoint,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
}
