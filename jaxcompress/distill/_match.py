# SPDX-License-Identifier: Apache-2.0
"""Pairs of sites of student and teacher whose features a loss compares, found by pattern."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._core import observe
from .._core.patterns import matches, nearest
from .._core.sites import Site
from .._errors import JaxCompressError, SiteError


@dataclasses.dataclass(frozen=True)
class Match:
    """Features to be compared, as `match` describes them."""

    student_pattern: str
    teacher_pattern: str
    loss: Callable
    weight: float = 1.0
    output: bool = False
    layers: tuple[int, ...] | None = None
    teacher: int = 0

    def pair(self, student: dict[str, Array], teacher: dict[str, Array]) -> list[Pair]:
        """The pairs among features by name, each list in program order.

        Raises:
          SiteError: different numbers of features, or `layers` that are not there.
        """
        ours, theirs = list(student.items()), list(teacher.items())
        if self.layers is not None:
            if max(self.layers, default=0) >= len(theirs) or min(self.layers, default=0) < 0:
                raise SiteError(
                    f"{self}: layers={self.layers} but the teacher has {len(theirs)} features: "
                    f"{_names(teacher)}."
                )
            theirs = [theirs[i] for i in self.layers]
        if len(ours) != len(theirs):
            raise SiteError(
                f"{self}: {len(ours)} features of the student ({_names(student)}) and "
                f"{len(theirs)} of the teacher ({_names(teacher)}). Narrow a pattern, or say with "
                "layers=jaxcompress.distill.uniform_layers(...) which of the teacher's to take."
            )
        return [
            Pair(f"{a}->{b}", x, jax.lax.stop_gradient(y))
            for (a, x), (b, y) in zip(ours, theirs, strict=True)
        ]

    def __str__(self) -> str:
        return f"match({self.student_pattern!r}, {self.teacher_pattern!r})"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A feature of the student and the one of the teacher that it is compared with."""

    name: str
    student: Any
    teacher: Any

    def shapes(self) -> Pair:
        """The same pair without its values."""
        return Pair(self.name, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.both))

    @property
    def both(self) -> tuple[Any, Any]:
        return self.student, self.teacher


def _names(features: dict[str, Array]) -> str:
    return ", ".join(f"`{name}`" for name in features) or "none"


def match(
    student_pattern: str,
    teacher_pattern: str,
    loss: Callable,
    *,
    weight: float = 1.0,
    output: bool = False,
    layers: Sequence[int] | None = None,
    teacher: int = 0,
) -> Match:
    """Says which features of the student `loss_fn` compares with which of the teacher, and how.

    Features are what flows into the sites that a pattern matches (`jc.tap`), in program order;
    of a scan over stacked layers, each layer is one. Where the loss compares number by number and
    the widths differ, the student's feature goes through a projection that is learned.

    Args:
      student_pattern, teacher_pattern: patterns on the names of sites (`jc.sites` lists them).
      loss: a loss of features, called as `loss(student, teacher, labels=..., mask=...)`.
      weight: factor of this loss in the sum; the pairs of one match are averaged.
      output: compare the results of the sites instead of what they read.
      layers: which of the teacher's features to take, such as `uniform_layers(4, 12)`.
      teacher: which teacher, if there are several.

    >>> match("layers/*/up", "layers/*/up", lambda s, t, **_: ((s - t) ** 2).mean()).weight
    1.0
    """
    layers = None if layers is None else tuple(layers)
    return Match(student_pattern, teacher_pattern, loss, weight, output, layers, teacher)


def observed(
    fn: Callable, who: str, patterns: Sequence[tuple[str, bool]], params: Any, inputs: Any
) -> tuple[Any, list[dict[str, Array]]]:
    """(result, for each (pattern, output) its features by name in program order), in one run.

    Raises:
      SiteError: a pattern that matches nothing.
    """
    if not patterns:
        return fn(params, inputs), []
    listed = [s for s in observe.sites(fn)(params, inputs) if not s.opaque]
    for pattern, _ in patterns:
        if not any(matches(pattern, s.name) for s in listed):
            raise SiteError(
                f"match: the pattern {pattern!r} matches no site of the {who}. Nearest: "
                f"{nearest(pattern, [s.name for s in listed])}. jaxcompress.sites lists all."
            )
    run, kinds = fn, sorted({output for _, output in patterns})
    for output in kinds:
        either = _either([p for p, o in patterns if o == output])
        run = observe.tap(run, either, output=output)
    out, seen = run(params, inputs), {}
    for output in reversed(kinds):
        out, seen[output] = out
    return out, [_features(listed, pattern, seen[output]) for pattern, output in patterns]


def _either(patterns: Sequence[str]) -> str:
    """One pattern for several."""
    forms = [p[3:] if p.startswith("re:") else fnmatch.translate(p) for p in patterns]
    return "re:" + "|".join(f"(?:{form})" for form in dict.fromkeys(forms))


def _features(sites: Sequence[Site], pattern: str, seen: dict[str, Array]) -> dict[str, Array]:
    """By name in program order; of a scan, each step apart."""
    found = {}
    for site in sites:
        if not matches(pattern, site.name) or site.name not in seen:
            continue
        x, count = seen[site.name], math.prod(site.loops)
        if not site.loops:
            found[site.name] = x
            continue
        steps = x.reshape(count, *x.shape[len(site.loops) :])
        found |= {f"{site.name}[{i}]": steps[i] for i in range(count)}
    return found


def projections_for(key: Array, match: Match, pairs: Sequence[Pair]) -> dict[str, Array]:
    """A matrix float32[student width, teacher width] for each pair that needs one, at random."""
    out = {}
    for i, pair in enumerate(pairs):
        a, b = pair.student.shape, pair.teacher.shape
        if not _needs(match, pair):
            continue
        if a[:-1] != b[:-1]:
            raise SiteError(
                f"{match}: {pair.name} has shapes {list(a)} and {list(b)}: only the last dimension "
                "may differ, a projection cannot make up for the others."
            )
        shape = (a[-1], b[-1])
        out[pair.name] = jax.random.normal(jax.random.fold_in(key, i), shape) / a[-1] ** 0.5
    return out


def _needs(match: Match, pair: Pair) -> bool:
    return getattr(match.loss, "same_width", True) and pair.student.shape != pair.teacher.shape


def compared(match: Match, pairs: Sequence[Pair], projections: dict, labels: Any, mask: Any):
    """The mean of the loss over the pairs, the student projected where it must be."""
    total = jnp.zeros(())
    for pair in pairs:
        x = pair.student
        if _needs(match, pair):
            if pair.name not in projections:
                raise JaxCompressError(
                    f"{match}: {pair.name} has widths {x.shape[-1]} and {pair.teacher.shape[-1]} "
                    "and there is no projection. Make them with projections = "
                    "loss.init(key, params, batch), call loss(params, batch, projections), and "
                    "train them with the student: argnums=(0, 2)."
                )
            x = x @ projections[pair.name].astype(x.dtype)
        total += match.loss(x, pair.teacher, labels=labels, mask=mask)
    return total / len(pairs)
