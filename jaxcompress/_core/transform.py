# SPDX-License-Identifier: Apache-2.0
"""What a transform is, and how it becomes a function from functions to functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._errors import JaxCompressError
from . import typed
from .analysis import MARK
from .arguments import ArgNums, chosen, label_arguments, positions
from .keys import TAKES_KEY, take_key
from .provenance import Label
from .qtensor import is_stored
from .region import Region, Traced
from .sites import Site
from .staging import Packed, PlainCalls, is_float, split


class Transform:
    """What to do at sites. Subclasses are frozen dataclasses: they are keys of jit's cache.

    Attributes:
      kind: one word; a site is owned by at most one transform of a kind.
      stateful: whether `learned` or `state` is used.
      travels: whether these may come and go with the parameters (`_core/typed.py`).
      collects: whether state is stacked over every scan, not only over scans of layers.
      takes_packed: whether `apply` takes a `QTensor` for a weight, as `bind` does.
      random: whether a site may draw random numbers.
      keyword: name of the keyword argument that then takes a random key.
    """

    kind = "transform"
    stateful = False
    travels = False
    collects = False
    takes_packed = False
    random = False
    keyword = ""

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        """The sites to change, by name, each with a hashable setting for `apply`."""
        raise NotImplementedError

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """Raises if something was asked for that matched nothing. Called once, with all sites."""

    def init_learned(self, site: Site, setting: Any) -> Any:
        """Differentiable arrays of a site, or None."""

    def init_state(self, site: Site, setting: Any) -> Any:
        """State of a site before the first call, or None."""

    def draws(self, setting: Any) -> bool:
        """Whether a site draws random numbers: `apply` then gets `learned["key"]`, its own key."""
        return False

    def accept(
        self, sites: Sequence[Site], settings: Mapping[str, Any], learned: Any, state: Any
    ) -> None:
        """Raises if `learned` and `state` are not what these sites need. Called when traced."""

    def stop_at(self, learned: Mapping[str, Any]) -> Any:
        """The layer at which a scan over layers stops (`learned` of its sites), or None."""

    def state_spec(self, site: Site, state: Any) -> Any:
        """How the state of a site inside shard_map is split over the mesh."""
        return jax.tree.map(lambda _: PartitionSpec(), state)

    def apply(
        self, site: Site, setting: Any, bind: Callable, operands: list, learned: Any, state: Any
    ) -> tuple[Any, Any]:
        """(result, new state or None); `bind(*operands, **changed_params)` runs the operation."""
        raise NotImplementedError


class Listing(Transform):
    """Chooses nothing: used to list the sites."""

    kind = "listing"

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        return {}


def mark_of(transform: Transform, argnums: Sequence[int | str] = (0,)) -> str:
    """Name of the regions that this transform emits; the same in every process.

    Other argnums than the usual make another mark: the same recipe on other parameters is not
    the same transform.
    """
    key = repr(transform) if tuple(argnums) == (0,) else repr((transform, tuple(argnums)))
    return f"{MARK}{transform.kind}_{zlib.crc32(key.encode()):08x}"


# What JAX raises where a function needs the value of an array: `if rate > 0`.
_NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Transformed:
    """A function with a transform applied at its sites.

    Args:
      fn: any function that JAX can trace.
      transform: what to do at the sites.
      argnums: positions (or names) of the arguments that hold the parameters.
    """

    def __init__(self, fn: Callable, transform: Transform, argnums: ArgNums = 0):
        if not callable(fn):
            raise JaxCompressError(
                f"expected a function, found {type(fn).__name__}. Wrap a model as a function of "
                "its parameters, such as lambda params, x: model.apply(params, x)."
            )
        self.fn, self.transform = fn, transform
        self.argnums = positions(argnums)
        self.floats = True  # whether Python floats are arrays to the function
        self.region = Region(transform, mark_of(transform, self.argnums))

        def whole(learned: Any, state: Any, key: Any, inputs: Packed):
            traced = self._trace(inputs, key)
            out, state = traced.run(transform, inputs.arrays, learned, state, key)
            return Packed.pack(out), state

        def direct(args: tuple, kwargs: dict):
            inputs = Packed.pack((args, kwargs))
            return Packed.pack(self._trace(inputs).run(transform, inputs.arrays, {}, {}, None)[0])

        whole.__name__ = direct.__name__ = self.region.mark
        whole.__qualname__ = direct.__qualname__ = self.region.mark
        self._jitted, self._direct = jax.jit(whole), jax.jit(direct)

    def plain_call(self, args: tuple, kwargs: dict) -> Any:
        """The result of the function where all leaves of its arguments are arrays: no state, no
        key. JAX takes the arguments apart itself, which is what an eager call waits for."""
        return self._direct(args, kwargs).unpack()

    def call(
        self, learned: Any, state: Any, args: tuple, kwargs: dict, key: Any = None
    ) -> tuple[Any, Any]:
        """(result of the function, new state)."""
        run = functools.partial(self._jitted, learned, state, key)
        out, state = self._with_floats(run, args, kwargs)
        return out.unpack(), state

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Traces and analyses only. Arguments may be `jax.ShapeDtypeStruct`s."""
        return self._with_floats(self._trace, args, kwargs)

    def _with_floats(self, run: Callable[[Packed], Any], args: tuple, kwargs: dict) -> Any:
        """Runs with Python floats as arrays, or as they are if the function needs their values.

        A learning rate that changes is no new program, but `if rate > 0` must work.
        """
        inputs = Packed.pack((args, kwargs), self.floats)
        try:
            return run(inputs)
        except _NEEDS_VALUE:
            if not any(map(is_float, inputs.arrays)):
                raise
        out = run(Packed.pack((args, kwargs), False))
        self.floats = False
        return out

    def _trace(self, inputs: Packed, key: Any = None) -> Traced:
        args, kwargs = inputs.unpack()
        params = self.params_of(args, kwargs)
        floats = len(split((args, kwargs))[1]) == len(inputs.arrays)
        labels, leaves = label_arguments(args, kwargs, params, floats)
        paths = [path for path, _ in leaves]

        def closure(count: int) -> list[Label]:
            return [Label()] * count

        arrays = inputs.arrays
        found = self.region.analyze(self.fn, inputs.call, arrays, labels, closure, paths, key)
        unique = distinct(found.sites)
        if not found.covered:
            self.transform.check(unique, paths)
        settings = self.transform.choose(found.plan.everything)
        kept = found.plan.select(frozenset(settings))
        shapes = tuple((path, _shape_of(x)) for path, x in leaves)
        return Traced(kept, found.staged, settings, unique, shapes)

    def parameters(self, args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
        """(key path, array) of each parameter among the arguments of a call."""
        return label_arguments(args, kwargs, self.params_of(args, kwargs), self.floats)[1]

    def replace(self, new: Mapping[str, Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a call with other values for the parameters of these key paths."""
        call, arrays = split((args, kwargs), self.floats)
        labels, leaves = label_arguments(args, kwargs, self.params_of(args, kwargs), self.floats)
        paths = iter(path for path, _ in leaves)
        named = [next(paths) if label.params else None for label in labels]
        merged = [new.get(n, x) if n else x for n, x in zip(named, arrays, strict=True)]
        return call.merge(merged)

    def params_of(self, args: tuple, kwargs: dict) -> tuple[int | str, ...]:
        """Which arguments of a call hold the parameters: positions, or names of keywords."""
        return chosen(self.fn, self.argnums, args, kwargs)

    def init(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(learned, state) before the first call, stacked over scans as the sites are."""
        traced = self.trace(*args, **kwargs)
        learned: dict[str, Any] = {}
        state: dict[str, Any] = {}
        for site in traced.plan.everything:
            setting = traced.settings[site.name]
            stack = site.loops if self.transform.collects else site.stack
            for into, value, lead in (
                (learned, self.transform.init_learned(site, setting), site.stack),
                (state, self.transform.init_state(site, setting), stack),
            ):
                if value is not None:
                    into[site.name] = jax.tree.map(
                        lambda x, lead=lead: jnp.broadcast_to(x, lead + jnp.shape(x)), value
                    )
        return learned, state


def distinct(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Every site once, also if it was traced twice; another site of the same name gets a number."""
    taken: dict[str, Site] = {}
    for site in sites:
        base, name = re.sub(r"#\d+$", "", site.name), site.name
        for k in itertools.count(1):
            old = taken.setdefault(name, site)
            if (old.op, old.operands) == (site.op, site.operands):
                break
            name = f"{base}#{k}"
    return tuple(dataclasses.replace(site, name=name) for name, site in taken.items())


def _shape_of(x: Any) -> Any:
    if is_stored(x):
        return jax.eval_shape(lambda q: q, x)
    return jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", None) or jnp.result_type(x))


def transformed_function(fn: Callable, transform: Transform, argnums: ArgNums = 0) -> Callable:
    """`fn` with a transform: same signature, same structure of results.

    State, if the transform has any, comes and goes with `TypedParams` among the arguments.
    """
    from .step import MutatingStep, TypedCall  # they build on this module

    inner = Transformed(fn, transform, argnums)
    typed_call, mutating = TypedCall(inner), MutatingStep(inner)
    plain = PlainCalls(lambda *call: mutating.wanted(*call) or bool(typed.find(call)))

    def wrapped(*args, **kwargs):
        if transform.keyword not in kwargs and plain(args, kwargs):
            return inner.plain_call(args, kwargs)
        key = take_key(fn, transform, kwargs)
        if mutating.wanted(args, kwargs):
            return mutating(args, kwargs, key)
        if typed.find((args, kwargs)):
            return typed_call(args, kwargs, key)
        return inner.call({}, {}, args, kwargs, key)[0]

    with contextlib.suppress(AttributeError, TypeError):
        wrapped = functools.wraps(fn)(wrapped)
    if transform.random:
        setattr(wrapped, TAKES_KEY, transform.keyword)
    setattr(wrapped, _INNER, (inner, wrapped))  # wrappers of a wrapper copy its attributes
    return wrapped


_INNER = "_jaxcompress"


def transformed_by(fn: Callable) -> Transformed | None:
    """What `transformed_function` made `fn` of, also under `jax.jit`; None if it did not."""
    if isinstance(fn, jax.stages.Wrapped):
        fn = getattr(fn, "__wrapped__", fn)
    inner, wrapped = getattr(fn, _INNER, (None, None))
    return inner if wrapped is fn else None
