# SPDX-License-Identifier: Apache-2.0
"""Calibration data flows once through a function and feeds collectors at its sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._core.sites import Plan, Site
from .._core.transform import Transform, Transformed
from .._errors import JaxCompressError, SiteError
from .collectors import COLLECTORS
from .rows import Rows, input_rows, rows_of


class Inputs:
    """A batch of several arguments: `Inputs(x, mask=m)` calls `fn(params, x, mask=m)`.

    >>> Inputs(1, train=False).kwargs
    {'train': False}
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, batch: Any) -> Inputs:
        """A batch as it is, or one argument as a batch."""
        return batch if isinstance(batch, cls) else cls(batch)


class Batches:
    """Calibration data that can be walked several times, a batch at a time.

    Args:
      source: a list or other iterable that starts anew each time, a function that returns an
        iterable, or an iterator, which can be walked once.
    """

    def __init__(self, source: Iterable[Any] | Callable[[], Iterable[Any]]):
        if not callable(source) and not isinstance(source, Iterable):
            raise JaxCompressError(
                "calibration is an iterable of batches, or a function that returns one; found "
                f"{type(source).__name__}."
            )
        self.source = source
        self.once = isinstance(source, Iterator)
        self.walked = False
        self._held: list[Any] = []  # what `first` took from an iterator

    def first(self) -> Inputs:
        """The first batch; it comes again when the batches are walked."""
        batches = iter(self._walk())
        for batch in batches:
            if self.once:
                self._held = [batch]
            return Inputs.of(batch)
        raise JaxCompressError("calibration has no batches: is the iterator used up?")

    def _walk(self) -> Iterable[Any]:
        return self.source() if callable(self.source) else self.source

    def __iter__(self) -> Iterator[Inputs]:
        if self.once and self.walked:
            raise JaxCompressError(
                "this needs to walk the calibration batches several times, and they come from an "
                "iterator, which is used up. Pass a list, or a function that returns an iterator."
            )
        self.walked = True
        held, self._held = self._held, []
        yield from map(Inputs.of, held)
        for batch in self._walk():
            yield Inputs.of(batch)


def check_arrays(tree: Any, number: int) -> None:
    """Raises if a batch is no batch of arrays.

    Raises:
      JaxCompressError: tracers or shapes instead of arrays, or an empty array.
    """
    for x in jax.tree.leaves(tree):
        if isinstance(x, (Tracer, jax.ShapeDtypeStruct)):
            raise JaxCompressError(
                "ranges are read from values: initialize and calibrate with arrays, outside of "
                "jit, grad and the like."
            )
        if getattr(x, "size", 1) == 0:
            raise JaxCompressError(
                f"calibration batch {number} has an empty array of shape {x.shape}."
            )


@dataclasses.dataclass(frozen=True)
class Collect(Transform):
    """Leaves the function alone; the state of its sites are statistics of their inputs.

    Attributes:
      wanted: (name of a site, names of collectors) each.
      one_layer: whether the scans over layers around these sites stop at a layer, whose number
        comes as `learned[site]["layer"]`; state is then of that layer alone.
    """

    wanted: tuple[tuple[str, tuple[str, ...]], ...]
    one_layer: bool = False

    kind = "collect"
    stateful = True

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        wanted = dict(self.wanted)
        found = {s.name: rows_of(s, s.weights[0]) for s in sites if s.name in wanted}
        return {name: (rows, wanted[name]) for name, rows in found.items() if rows is not None}

    def stop_at(self, learned: Mapping[str, Any]) -> Any:
        return next(iter(learned.values()))["layer"] if self.one_layer and learned else None

    def init_state(self, site: Site, setting: tuple[Rows, tuple[str, ...]]) -> Any:
        rows, names = setting
        return {name: COLLECTORS[name].init(rows.lead, rows.channels) for name in names}

    def apply(self, site, setting, bind, operands, learned, state):
        rows, names = setting
        x = operands[1 - rows.weight]
        seen, count = input_rows(site, rows, jax.lax.stop_gradient(x), bind.rest)
        operand = site.operands[1 - rows.weight]
        inner = set(site.contracting(1 - rows.weight)) if site.op == "dot_general" else set()
        if split := operand.split_over(sorted(inner)):
            raise SiteError(
                f"the input channels of `{site.name}` are split over the mesh axes {split}: "
                "statistics between channels of two devices are not collected there. Calibrate "
                "without shard_map, or leave the site to method='rtn'."
            )
        sync = operand.split_over(range(x.ndim))
        new = {n: COLLECTORS[n].update(state[n], seen, count, sync) for n in names}
        return bind(*operands), new


def same_inputs(plan: Plan) -> dict[str, str]:
    """By name of a site, the first site that reads the very same input (q for q, k and v)."""
    out: dict[str, str] = {}

    def walk(plan: Plan) -> None:
        seen: dict[Any, str] = {}
        for site in plan.sites.values():
            rows = rows_of(site, site.weights[0]) if site.weights else None
            if rows is None:
                continue
            i = 1 - rows.weight
            window = (rows.shape, repr(site.params)) if "conv" in site.op else ()
            key = (id(site.eqn.invars[i]), site.op, site.contracting(i), rows.lead, window)
            out.setdefault(site.name, seen.setdefault(key, site.name))
        for plans in plan.calls.values():
            for inner in plans:
                walk(inner)

    walk(plan)
    return out


class _Program:
    """A function that collects, traced and compiled once; it keeps the function alive."""

    def __init__(self, fn: Callable, transform: Collect):
        self.inner, self.one_layer = Transformed(fn, transform), transform.one_layer
        self.step = jax.jit(self._step)
        self.start = jax.jit(self._start)

    def _start(self, args: tuple, kwargs: dict) -> Any:
        """State before the first batch, of one layer if only one is looked at."""
        _, state = self.inner.init(*args, **kwargs)
        return jax.tree.map(lambda x: x[0], state) if self.one_layer else state

    def _step(self, learned: Any, state: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        _, state = self.inner.call(learned, state, args, kwargs)
        fine = {
            name: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found)]))
            for name, found in state.items()
        }
        return state, fine


def collect(
    fn: Callable,
    params: Any,
    batches: Batches,
    wanted: Mapping[str, Sequence[str]],
    *,
    layer: int | None = None,
    show: Callable[[], None] = lambda: None,
    compiled: dict[Any, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs a function over batches and returns statistics of the inputs of its sites.

    Args:
      fn: a function whose first argument are the parameters.
      params: these.
      batches: the data; one batch is in memory at a time.
      wanted: by name of a site, names of collectors.
      layer: only this layer of the scan around the sites; the layers behind it are not run.
      show: called after each batch.
      compiled: what earlier calls with it compiled is used again: for all layers of a scan one
        program.

    Returns:
      By name of a site and collector the statistic, float32, stacked over the scans over layers
      (`Site.stack`, without the first if `layer` is given), then `Rows.lead`.

    Raises:
      JaxCompressError: no batches, an empty one, or one that makes values that are not finite.
    """
    transform = Collect(tuple((n, tuple(c)) for n, c in wanted.items()), layer is not None)
    known = {} if compiled is None else compiled
    program = known.setdefault((id(fn), transform), _Program(fn, transform))
    state: Any = None
    learned = {} if layer is None else {name: {"layer": jnp.int32(layer)} for name in wanted}
    number = 0
    for number, batch in enumerate(batches):
        args, kwargs = (params, *batch.args), batch.kwargs
        check_arrays((batch.args, kwargs), number)
        if state is None:
            state = program.start(args, kwargs)
        state, fine = program.step(learned, state, args, kwargs)
        if bad := [name for name, ok in fine.items() if not np.asarray(ok)]:
            raise JaxCompressError(
                f"calibration batch {number} makes values that are NaN or infinite at "
                f"`{bad[0]}`: no range can hold them. Look at that batch and the parameters."
            )
        show()
    if state is None:
        raise JaxCompressError("calibration has no batches: is the iterator used up?")
    return {
        site: {name: COLLECTORS[name].finish(x) for name, x in found.items()}
        for site, found in state.items()
    }
