# SPDX-License-Identifier: Apache-2.0
"""Walks an analysis in program order and gives every site its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from . import _compat
from .analysis import Analysis, Draft
from .analyze import CALLS, row_rank
from .sites import LOOKUPS, Operand, Plan, Site


def name_sites(jaxpr: Any, found: Analysis, paths: Sequence[str]) -> Plan:
    """Names the sites of an analysis in program order; `paths` are the parameters by number."""
    namer = _Namer(paths, found.experts)
    return namer.walk(jaxpr, found, list(range(len(paths))), "", ())


class _Namer:
    def __init__(self, paths: Sequence[str], experts: frozenset[int]):
        self.paths, self.experts = paths, experts
        self.counts: dict[str, int] = {}

    def unique(self, base: str, always: bool) -> str:
        k = self.counts[base] = self.counts.get(base, -1) + 1
        return f"{base}#{k}" if k or always else base

    def walk(
        self,
        jaxpr: Any,
        found: Analysis,
        numbers: list[int],
        scope: str,
        loops: tuple[tuple[int, int, bool], ...],
    ) -> Plan:
        """`loops`: (depth, length, whether over stacked layers) of the enclosing scans."""
        plan = Plan(extra=found.extra)
        seen: dict[str, Site] = {}
        for i in sorted({*found.drafts, *found.calls}):
            eqn = jaxpr.eqns[i]
            inner = "/".join(x for x in (scope, _scope(eqn)) if x)
            if i in found.drafts:
                if self.picks_expert(found.drafts[i], numbers):
                    continue
                site = self.site(found.drafts[i], numbers, inner, loops)
                plan.sites[i] = site
                seen.setdefault(site.name, site)
                continue
            call = found.calls[i]
            plans = []
            before = dict(self.counts)
            for body, (analysis, local) in zip(_bodies(eqn, found, i), call.bodies, strict=True):
                if eqn.primitive.name == "custom_vjp_call":
                    self.counts = dict(before)  # primal and forward rule share their names
                below = loops
                if call.scan is not None:
                    below = (*loops, (call.scan, call.length, call.scan in analysis.layers))
                outer = [numbers[n] for n in local]
                plans.append(self.walk(body, analysis, outer, inner, below))
                for site in plans[-1].everything:
                    seen.setdefault(site.name, site)
            plan.calls[i] = tuple(plans)
        plan.everything = list(seen.values())
        plan.names = frozenset(seen)
        return plan

    def picks_expert(self, draft: Draft, numbers: list[int]) -> bool:
        """Whether this looks up whole matrices that a matmul then reads as its weight."""
        if draft.eqn.primitive.name not in LOOKUPS or row_rank(draft.eqn) < 2:
            return False
        return any(numbers[n] in self.experts for n in draft.labels[0].params)

    def site(self, draft: Draft, numbers: list[int], scope: str, loops: tuple) -> Site:
        eqn, operands, used = draft.eqn, [], []
        scans: frozenset[int] = frozenset()
        for label, role, v in zip(draft.labels, draft.roles, eqn.invars, strict=False):
            path = ""
            if role == "weight":
                path = "+".join(sorted(self.paths[numbers[n]] for n in label.params))
                scans |= label.scans
                used.append(path)
            shape = tuple(getattr(v.aval, "shape", ()))
            dtype = getattr(v.aval, "dtype", None)
            constant = not label.data and not label.params
            reads = label.reads if role == "weight" and len(label.params) == 1 else None
            operands.append(
                Operand(role, path, shape, dtype, constant, label.manual, label.owners, reads)
            )
        op = "gather" if eqn.primitive.name in LOOKUPS else eqn.primitive.name
        base = used[0] if used and not draft.opaque else ""
        if not base:
            base = "/".join(x for x in (scope, op) if x)
        layered = tuple(d in scans or (layers and not used) for d, _, layers in loops)
        return Site(
            name=self.unique(base, always=not used or draft.opaque),
            op=op,
            operands=tuple(operands),
            out_avals=tuple(v.aval for v in eqn.outvars),
            scope=scope,
            loops=tuple(n for _, n, _ in loops),
            layered=layered,
            opaque=draft.opaque,
            eqn=eqn,
        )


def _scope(eqn: Any) -> str:
    """Name stack without the names of transformations around it: vmap(attn) is attn."""
    stack = str(eqn.source_info.name_stack)
    while True:
        plain = re.sub(r"\w+\(([^()]*)\)", r"\1", stack)
        if plain == stack:
            return "/".join(x for x in stack.split("/") if x)
        stack = plain


def _bodies(eqn: Any, found: Analysis, i: int) -> list[Any]:
    """The jaxprs of a call, in the order in which the rule recorded them."""
    p, name = eqn.params, eqn.primitive.name
    if name == "scan":
        jaxprs = [p["jaxpr"]]
    elif name == "while":
        jaxprs = [p["cond_jaxpr"], p["body_jaxpr"]]
    elif name == "cond":
        jaxprs = list(p["branches"])
    elif name == "custom_vjp_call":
        rule = found.extra[i]
        jaxprs = [p["call_jaxpr"], *([rule.jaxpr] if rule else [])]
    elif i in found.extra:  # a site in integers
        jaxprs = [found.extra[i][0]]
    else:
        jaxprs = [p[CALLS[name]]]
    return [_compat.open_jaxpr(j)[0] for j in jaxprs]
