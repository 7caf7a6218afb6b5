# SPDX-License-Identifier: Apache-2.0
"""Rules of calls, loops and branches.

A scan is written out, step by step, where it runs over known parameters (stacked layers, which
then are tensors of their own) or is short; else it is a Scan whose body is a subgraph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from ..._core import _compat
from ..._errors import ArtifactError
from .convert import Converter, rule
from .graph import Graph, Value
from .passes import finish

_CALLS = ("pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
          "custom_vjp_call_jaxpr", "remat", "checkpoint", "remat2", "custom_lin")  # fmt: skip
_SHORT = 4


@rule(*_CALLS)
def _call(cv: Converter, eqn: Any, xs: list) -> list:
    p = eqn.params
    inner = next(p[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in p)
    jaxpr, consts = _compat.open_jaxpr(inner)
    return cv.run(jaxpr, consts, xs[len(xs) - len(jaxpr.invars) :])


# A call on known operands is walked too: what only moves stays a view.
rule(*_CALLS, constant=True)(_call)


@rule("scan")
def _scan(cv: Converter, eqn: Any, xs: list) -> list:
    p = eqn.params
    consts, carry, over = _compat.split_scan(p, xs)
    jaxpr, closed = _compat.open_jaxpr(p["jaxpr"])
    parameters = any(not isinstance(x, Value) and x.ndim > 1 for x in over)
    if parameters or p["length"] <= _SHORT:
        return _unrolled(cv, eqn, jaxpr, closed, consts, carry, over)
    body = Graph(cv.opset, cv.graph)
    inside = cv.within(body)
    held = [_outer(cv, x) for x in consts]
    avals = [v.aval for v in jaxpr.invars[len(consts) :]]
    names = [body.fresh("in") for _ in avals]
    inputs = [cv.value(n, a.shape, a.dtype) for n, a in zip(names, avals, strict=True)]
    outputs = _results(inside, inside.run(jaxpr, closed, [*held, *inputs]), jaxpr.outvars)
    types = [(cv.dtype(a.dtype), a.shape) for a in avals]
    given = [cv.tensor(x) for x in (*carry, *over)]
    if not over:  # as many zeros as it has steps, which the body leaves unread
        names.append(body.fresh("step"))
        types.append((cv.dtype(np.int64), ()))
        given.append(cv.graph.constant(np.zeros(p["length"], np.int64)))
    types += [(cv.dtype(v.aval.dtype), v.aval.shape) for v in jaxpr.outvars]
    block = subgraph(inside, "body", names, outputs, *map(list, zip(*types)))
    back, many = int(p["reverse"]), len(jaxpr.outvars) - len(carry)
    attributes: dict[str, Any] = {"body": block, "num_scan_inputs": len(given) - len(carry)}
    if back:
        attributes["scan_input_directions"] = [1] * attributes["num_scan_inputs"]
        attributes["scan_output_directions"] = [1] * many
    found = cv.graph.emit("Scan", given, outputs=len(eqn.outvars), **attributes)
    return cv.results(eqn, found)


def _unrolled(
    cv: Converter, eqn: Any, jaxpr: Any, closed: list, consts: list, carry: list, over: list
) -> list:
    n, stacks = eqn.params["length"], []
    steps = range(n - 1, -1, -1) if eqn.params["reverse"] else range(n)
    whole = [cv.plain(x) if isinstance(x, Value) else x for x in over]
    for i in steps:
        here = [x[i] if not isinstance(x, Value) else _step(cv, x, i) for x in whole]
        outs = cv.run(jaxpr, closed, [*consts, *carry, *here])
        carry = outs[: len(carry)]
        stacks.append(outs[len(carry) :])
    if eqn.params["reverse"]:
        stacks.reverse()
    return [*carry, *(_stacked(cv, list(column)) for column in zip(*stacks))]


def _step(cv: Converter, x: Value, i: int) -> Value:
    name = cv.graph.emit("Gather", [x.name, cv.graph.constant(np.int64(i))], axis=0)
    return cv.value(name, x.shape[1:], x.dtype)


def _stacked(cv: Converter, xs: list) -> Any:
    if not any(isinstance(x, Value) for x in xs):
        return np.stack(xs)
    parts = [cv.graph.emit("Unsqueeze", [cv.tensor(x), cv.graph.ints(0)]) for x in xs]
    return cv.value(cv.graph.emit("Concat", parts, axis=0), (len(xs), *xs[0].shape), xs[0].dtype)


@rule("while")
def _while(cv: Converter, eqn: Any, xs: list) -> list:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    of_cond, of_body, carry = xs[:n], xs[n : n + m], xs[n + m :]
    of_cond, of_body = ([_outer(cv, x) for x in c] for c in (of_cond, of_body))
    conditions, bodies = (_compat.open_jaxpr(p[k]) for k in ("cond_jaxpr", "body_jaxpr"))
    start = [cv.plain(x) for x in carry]
    (go,) = cv.run(*conditions, [*of_cond, *start])
    body = Graph(cv.opset, cv.graph)
    inside = cv.within(body)
    avals = [v.aval for v in eqn.outvars]
    count, on = body.fresh("count"), body.fresh("on")
    names = [body.fresh("in") for _ in avals]
    inputs = [cv.value(name, a.shape, a.dtype) for name, a in zip(names, avals, strict=True)]
    outs = inside.run(*bodies, [*of_body, *inputs])
    (again,) = inside.run(*conditions, [*of_cond, *outs])
    outputs = _results(inside, [again, *outs], [conditions[0].outvars[0], *eqn.outvars])
    int64, boolean = cv.dtype(np.int64), cv.dtype(bool)
    kinds = [cv.dtype(a.dtype) for a in avals]
    shapes = [a.shape for a in avals]
    block = subgraph(
        inside,
        "body",
        [count, on, *names],
        outputs,
        [int64, boolean, *kinds, boolean, *kinds],
        [(), (), *shapes, (), *shapes],
    )
    found = cv.graph.emit(
        "Loop", ["", cv.tensor(go), *(cv.tensor(x) for x in start)], outputs=len(avals), body=block
    )
    return cv.results(eqn, found)


@rule("cond")
def _cond(cv: Converter, eqn: Any, xs: list) -> list:
    which, *operands = xs
    branches = [_compat.open_jaxpr(b) for b in eqn.params["branches"]]
    if not isinstance(which, Value):
        return cv.run(*branches[int(np.clip(which, 0, len(branches) - 1))], operands)
    operands = [_outer(cv, x) for x in operands]
    index = cv.tensor(which)
    found = _branch(cv, eqn, index, which.dtype, branches, operands, 0)
    return cv.results(eqn, found)


def _branch(
    cv: Converter,
    eqn: Any,
    index: str,
    dtype: Any,
    branches: list[tuple[Any, list]],
    operands: list,
    first: int,
) -> list[str]:
    """Names of the results of the branch that the index says, of those from `first` on."""
    if first == len(branches) - 1:
        return _results(cv, cv.run(*branches[first], operands), eqn.outvars)
    here = cv.graph.emit("LessOrEqual", [index, cv.graph.constant(np.asarray(first, dtype))])
    graphs = []
    for part in (branches[first : first + 1], branches[first:]):
        body = Graph(cv.opset, cv.graph)
        inside = cv.within(body)
        if len(part) == 1:
            outputs = _results(inside, inside.run(*part[0], operands), eqn.outvars)
        else:
            outputs = _branch(inside, eqn, index, dtype, branches, operands, first + 1)
        kinds, shapes = zip(*[(cv.dtype(v.aval.dtype), v.aval.shape) for v in eqn.outvars])
        graphs.append(subgraph(inside, "branch", [], outputs, list(kinds), list(shapes)))
    found = cv.graph.emit(
        "If", [here], outputs=len(eqn.outvars), then_branch=graphs[0], else_branch=graphs[1]
    )
    return [found] if isinstance(found, str) else found


@rule("platform_index")
def _platform(cv: Converter, eqn: Any, xs: list) -> Any:
    return _default_platform(eqn)


@rule("platform_index", constant=True)
def _known_platform(cv: Converter, eqn: Any, xs: list) -> Any:
    return _default_platform(eqn)


def _default_platform(eqn: Any) -> np.ndarray:
    """The branch for platforms that are not named; else that of the CPU."""
    platforms = eqn.params["platforms"]
    for i, names in enumerate(platforms):
        if names is None or "cpu" in names:
            return np.int32(i)  # type: ignore[return-value]
    raise ArtifactError(f"none of its platforms {platforms} is what ONNX runs on.")


def _outer(cv: Converter, x: Any) -> Any:
    """A value that a subgraph can read: what waits is written outside of it."""
    if not isinstance(x, Value):
        return x
    if x.quantized is not None and x.quantized.constant and not x.name:
        return x
    return cv.plain(x)


def _results(cv: Converter, outs: Sequence, variables: Sequence) -> list[str]:
    """Names of results of a subgraph, each written in it and different."""
    names = []
    for x, v in zip(outs, variables, strict=True):
        name = cv.tensor(x)
        if x.dtype != v.aval.dtype:
            name = cv.cast(name, v.aval.dtype)
        names.append(cv.graph.emit("Identity", [name]))
    return names


def subgraph(
    cv: Converter, name: str, inputs: list, outputs: list, kinds: list, shapes: list
) -> onnx.GraphProto:
    """What was written, with its inputs and outputs, of these types in their order."""
    graph = cv.graph

    def described(i: int, tensor: str) -> Any:
        return onnx.helper.make_tensor_value_info(
            tensor, kinds[i], [d if isinstance(d, int) else str(d) for d in shapes[i]]
        )

    finish(graph, outputs, cv.target)
    infos = [described(i, n) for i, n in enumerate([*inputs, *outputs])]
    return onnx.helper.make_graph(
        graph.nodes, name, infos[: len(inputs)], infos[len(inputs) :], graph.stored()
    )


@rule("custom_partitioning", "shard_map")
def _refused(cv: Converter, eqn: Any, xs: list) -> Any:
    raise ArtifactError("it spreads work over devices. Export the function of one device.")
