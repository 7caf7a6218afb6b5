# SPDX-License-Identifier: Apache-2.0
"""Batch norm folded into the convolution or linear layer before it.

Behind a site z = W x that only a chain of additions and multiplications with parameters follows,
y = A z + B with A and B for each output channel. W becomes W A, the last parameter that the chain
adds becomes B, and the rest of the chain is left out.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from .. import _compat
from ..arguments import ArgNums
from ..sites import Site
from ..staging import split
from .folded import Fold, FoldedNorm, Step, on_weight, output_channels, written
from .graph import Graph, Node, channel_graph
from .params import param_tree

INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"})
AFFINE = frozenset({"add", "sub", "mul", "div", "neg", "convert_element_type", "copy"})
READS = frozenset(
    """broadcast_in_dim reshape squeeze transpose copy copy_p convert_element_type
    stop_gradient""".split()
)


def fold_norm(fn: Callable, argnums: ArgNums = 0) -> Callable[..., FoldedNorm]:
    """Folds normalizations with stored statistics into the sites before them.

    Args:
      fn: a forward pass in inference mode.
      argnums: arguments that hold the parameters and the stored means and variances.

    Returns:
      A function of the arguments of `fn` (parameters as arrays) that returns a `FoldedNorm`.

    >>> ones = jnp.ones((1, 2))
    >>> params = {"w": jnp.ones((4, 2)), "mean": ones, "var": 4 * ones}
    >>> fn = lambda p, x: jax.nn.relu((x @ p["w"] - p["mean"]) / jnp.sqrt(p["var"]))
    >>> folded = fold_norm(fn)(params, jnp.ones((3, 4)))
    >>> float(folded.params["w"][0, 0]), float(folded.params["mean"][0, 0]), dict(folded.folded)
    (0.5, 0.5, {'w': ('mean', 'var')})

    References: Jacob et al. 2018, section 3.2; Nagel et al. 2019, section 4.1.2.
    """

    def run(*args: Any, **kwargs: Any) -> FoldedNorm:
        graph = channel_graph(fn, argnums, args, kwargs)
        plan = _Plan(graph)
        tree = param_tree(graph, fn, argnums, args, kwargs)
        given = tuple(args[k] if isinstance(k, int) else kwargs[k] for k in tree.arguments)
        call, flat = tree.split(given if tree.order is not None else given[0])
        flat = plan.values([jnp.asarray(x) for x in flat])
        folded = {f.site.name: tuple(graph.paths[k] for k in sorted(f.norm)) for f in plan.folds}

        @jax.jit
        def folded_fn(*args: Any, **kwargs: Any) -> Any:
            again = channel_graph(fn, argnums, args, kwargs)
            arrays = split((args, kwargs))[1]
            outs = _Plan(again, set(folded)).evaluate(again.node, arrays)
            return again.traced.staged.rebuild(outs)

        return FoldedNorm(folded_fn, tree.merge(call, flat), folded, plan.kept)

    return run


class _Plan:
    """The folds of a graph. `only`: names of the sites to fold; None: all that can be."""

    def __init__(self, graph: Graph, only: set[str] | None = None):
        self.graph = graph
        self.parents: dict[Node, tuple[Node, int]] = {}
        self.params: dict[Node, dict[Any, frozenset[int] | None]] = {}
        self.label(graph.node, [None if k is None else frozenset([k]) for k in graph.inputs])
        self.folds: list[Fold] = []
        self.kept: dict[str, str] = {}
        for n in self.params:
            for i, site in n.plan.sites.items():
                if only is not None and site.name not in only:
                    continue
                found = self.fold(n, i, site)
                if isinstance(found, Fold):
                    self.folds.append(found)
                else:
                    self.kept[site.name] = found
        for site in graph.sites:
            if site.name not in self.kept and site.name not in {f.site.name for f in self.folds}:
                self.kept[site.name] = "it is inside a loop, a branch or a custom rule"

    def label(self, n: Node, ins: Sequence[frozenset[int] | None]) -> None:
        """Numbers of the parameters that each variable is computed from; None: from data too."""
        env: dict[Any, frozenset[int] | None] = dict(zip(n.jaxpr.invars, ins))
        env.update(dict.fromkeys(n.jaxpr.constvars, frozenset()))
        self.params[n] = env
        for i, eqn in enumerate(n.jaxpr.eqns):
            labels = [frozenset() if isinstance(v, Literal) else env[v] for v in eqn.invars]
            if eqn.primitive.name in INLINED and i in n.subs:
                (sub,) = n.subs[i]
                self.parents[sub] = n, i
                self.label(sub, labels)
                outs = [self.of(sub, v) for v in sub.jaxpr.outvars]
            else:
                data = any(x is None for x in labels)
                outs = [None if data else frozenset().union(*labels)] * len(eqn.outvars)  # type: ignore[arg-type]
            env.update(zip(eqn.outvars, outs))

    def of(self, n: Node, v: Any) -> frozenset[int] | None:
        return frozenset() if isinstance(v, Literal) else self.params[n][v]

    # -------------------------------------------------------------- what can be folded

    def fold(self, n: Node, i: int, site: Site) -> Fold | str:
        """How to fold what follows a site, or why not."""
        if site.opaque or site.op not in ("dot_general", "conv_general_dilated"):
            return f"nothing is folded into {site.op}"
        if len(site.weights) != 1:
            return "it has no weight of its own"
        steps, norm = self.chain(n, n.jaxpr.eqns[i].outvars[0])
        if not any(n.jaxpr.eqns[s.index].primitive.name in ("mul", "div") for s in steps):
            return "no multiplication by parameters follows it"
        if not norm:
            return "only constants follow it"
        weight = self.source(n, n.jaxpr.eqns[i].invars[site.weights[0]])
        if weight is None:
            return "its weight is computed from parameters, not one of them"
        path = self.graph.paths[weight]
        if self.uses(self.graph.node, self.graph.node.jaxpr.invars[self.place(weight)]) != 1:
            return f"`{path}` is used elsewhere too"
        shift, shape = None, site.out_avals[0].shape
        channels = math.prod(shape[d] for d in output_channels(site))
        adds = [s for s in steps if n.jaxpr.eqns[s.index].primitive.name in ("add", "sub")]
        for s in adds:
            eqn = n.jaxpr.eqns[s.index]
            number = self.source(n, eqn.invars[1 - s.operand])
            if number is None or (eqn.primitive.name == "sub" and s.operand == 1):
                continue
            if math.prod(self.graph.shapes[number]) != channels:
                continue
            if self.uses(self.graph.node, self.graph.node.jaxpr.invars[self.place(number)]) == 1:
                shift = s, number
        if adds and shift is None:
            return "no parameter of the norm can take its shift"
        return Fold(site, n, i, weight, steps, shift, norm - {weight})

    def chain(self, n: Node, v: Any) -> tuple[tuple[Step, ...], frozenset[int]]:
        """Additions and multiplications with parameters that alone use a variable."""
        steps: list[Step] = []
        norm: frozenset[int] = frozenset()
        done: tuple[int, frozenset[int]] = 0, norm  # up to the last step that a parameter is in
        while True:
            readers = [
                Step(j, k)
                for j, eqn in enumerate(n.jaxpr.eqns)
                for k, x in enumerate(eqn.invars)
                if x is v
            ]
            if len(readers) != 1 or any(x is v for x in n.jaxpr.outvars):
                break
            step, eqn = readers[0], n.jaxpr.eqns[readers[0].index]
            name, rest = eqn.primitive.name, [self.of(n, x) for x in eqn.invars]
            rest.pop(step.operand)
            if name not in AFFINE or any(x is None for x in rest):
                break
            if (name == "div" and step.operand == 1) or eqn.outvars[0].aval.shape != v.aval.shape:
                break
            if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
                break
            steps.append(step)
            norm = norm.union(*rest)  # type: ignore[arg-type]
            if any(rest):
                done = len(steps), norm
            v = eqn.outvars[0]
        return tuple(steps[: done[0]]), done[1]

    def source(self, n: Node, v: Any) -> int | None:
        """The parameter that a variable is read from, whole."""
        found = self.reads(n, v)
        return found[0] if found else None

    def reads(self, n: Node, v: Any) -> tuple[int, list[Any]] | None:
        """(number of a parameter, the equations that read a variable from it), or None."""
        if isinstance(v, Literal) or v in n.jaxpr.constvars:
            return None
        if v in n.jaxpr.invars:
            k = n.jaxpr.invars.index(v)
            if n not in self.parents:
                number = self.graph.inputs[k]
                return None if number is None else (number, [])
            parent, i = self.parents[n]
            return self.reads(parent, parent.jaxpr.eqns[i].invars[k])
        eqn = next(e for e in n.jaxpr.eqns if any(o is v for o in e.outvars))
        found = self.reads(n, eqn.invars[0]) if eqn.primitive.name in READS else None
        return (found[0], [*found[1], eqn]) if found else None

    def place(self, number: int) -> int:
        """Which input of the jaxpr a parameter is."""
        return self.graph.inputs.index(number)

    def uses(self, n: Node, v: Any) -> int:
        """How often the values of a variable are used."""
        count = sum(x is v for x in n.jaxpr.outvars)
        for i, eqn in enumerate(n.jaxpr.eqns):
            for k, x in enumerate(eqn.invars):
                if x is not v:
                    continue
                if i in n.subs and eqn.primitive.name in INLINED:
                    (sub,) = n.subs[i]
                    count += self.uses(sub, sub.jaxpr.invars[k])
                elif eqn.primitive.name in READS:
                    count += self.uses(n, eqn.outvars[0])
                else:
                    count += 1
        return count

    # -------------------------------------------------------------- the folded function

    def evaluate(self, n: Node, args: Sequence) -> list:
        """Runs a node without the folded chains."""
        env: dict[Any, Any] = dict(zip(n.jaxpr.invars, args, strict=True))
        env.update(zip(n.jaxpr.constvars, n.consts))
        left_out: dict[int, Fold] = {}
        for f in self.folds:
            if f.node is n:
                left_out.update({s.index: f for s in f.steps})

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for i, eqn in enumerate(n.jaxpr.eqns):
            f = left_out.get(i)
            if f is not None:
                if f.shift is None:
                    env[f.end] = env[f.start].astype(f.end.aval.dtype)
                elif f.shift[0].index == i:
                    step = f.shift[0]
                    values = [read(v) for v in eqn.invars if v is not eqn.invars[step.operand]]
                    z = env[f.start].astype(eqn.invars[step.operand].aval.dtype)
                    values.insert(step.operand, z)
                    with _compat.equation_scope(eqn):
                        (out,) = _compat.bind(eqn, values)
                    env[f.end] = out.astype(f.end.aval.dtype)
                continue
            values = [read(v) for v in eqn.invars]
            with _compat.equation_scope(eqn):
                inner = n.subs.get(i, [None])[0] if eqn.primitive.name in INLINED else None
                outs = self.evaluate(inner, values) if inner else _compat.bind(eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in n.jaxpr.outvars]

    # -------------------------------------------------------------- the folded parameters

    def values(self, flat: list) -> list:
        """The parameters after folding. Sites whose norm differs along positions are kept."""
        known: dict[Node, dict[Any, Any]] = collections.defaultdict(dict)
        self.constants(self.graph.node, known, self.inputs(flat))
        new, folds = list(flat), []
        for f in self.folds:
            scale, shift = self.affine(f, known[f.node])
            axes = output_channels(f.site)
            rest = tuple(d for d in range(scale.ndim) if d not in axes)
            first = tuple(slice(None) if d in axes else slice(0, 1) for d in range(scale.ndim))
            same = [np.array_equal(a, np.broadcast_to(a[first], a.shape)) for a in (scale, shift)]
            if not all(same):
                self.kept[f.site.name] = "what follows it differs along positions"
                continue
            w = f.node.jaxpr.eqns[f.index].invars[f.site.weights[0]]
            # Factors in the shape of the operand: the output channels are its free dimensions.
            factor = on_weight(f.site, np.squeeze(scale[first], rest))
            changed = {f.weight: written(flat[f.weight], self.reads(f.node, w), factor, True)}
            if f.shift is not None:
                step, number = f.shift
                eqn = f.node.jaxpr.eqns[step.index]
                other = eqn.invars[1 - step.operand]
                values = -shift if eqn.primitive.name == "sub" else shift
                values = values[tuple(slice(0, n) for n in other.aval.shape)]
                read = self.reads(f.node, other)
                changed[number] = written(flat[number], read, values, False)
            if any(x is None for x in changed.values()):
                self.kept[f.site.name] = "its weight or the shift is shared by several channels"
                continue
            for number, x in changed.items():
                new[number] = x
            folds.append(f)
        self.folds = folds
        return new

    def inputs(self, flat: list) -> list:
        return [None if k is None else flat[k] for k in self.graph.inputs]

    def constants(self, n: Node, known: dict, args: Sequence) -> list:
        """Values of everything that is computed from parameters alone, in a node and below."""
        env = known[n]
        env.update({v: x for v, x in zip(n.jaxpr.invars, args) if x is not None})
        env.update(zip(n.jaxpr.constvars, n.consts))
        for i, eqn in enumerate(n.jaxpr.eqns):
            values = [v.val if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
            if eqn.primitive.name in INLINED and i in n.subs:
                outs = self.constants(n.subs[i][0], known, values)
                env.update({v: x for v, x in zip(eqn.outvars, outs) if x is not None})
            elif all(self.of(n, v) is not None for v in eqn.outvars) and eqn.outvars:
                env.update(zip(eqn.outvars, _compat.bind(eqn, values)))
        return [v.val if isinstance(v, Literal) else env.get(v) for v in n.jaxpr.outvars]

    def affine(self, f: Fold, env: dict) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) of y = A z + B, in the shape of z."""

        def chain(z):
            for step in f.steps:
                eqn = f.node.jaxpr.eqns[step.index]
                values = [v.val if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
                values[step.operand] = z
                (z,) = _compat.bind(eqn, values)
            return z

        aval = f.start.aval
        zero, one = (jnp.full(aval.shape, k, aval.dtype) for k in (0, 1))
        shift, scale = jax.jvp(chain, (zero,), (one,))
        return np.asarray(scale), np.asarray(shift)
