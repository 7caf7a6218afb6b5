# SPDX-License-Identifier: Apache-2.0
"""What a transform is, and how it becomes a function from functions to functions."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._errors import JaxCompressError, SiteError
from . import _compat, autodiff
from .analyze import MARK, OPAQUE, Analyzer, name_sites
from .interpret import Runtime, evaluate
from .provenance import DATA, Label, key_path
from .sites import Plan, Site
from .staging import Call, Packed, Staged, is_array, split, stage

ArgNums = int | str | Sequence[int | str]


class Transform:
    """What to do at sites. Subclasses are frozen dataclasses: they are keys of jit's cache.

    Attributes:
      kind: one word; a site is owned by at most one transform of a kind.
      stateful: whether `learned` or `state` is used.
      collects: whether state is stacked over every scan, not only over scans of layers.
    """

    kind = "transform"
    stateful = False
    collects = False

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        """The sites to change, by name, each with a hashable setting for `apply`."""
        raise NotImplementedError

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """Raises if something was asked for that matched nothing. Called once, with all sites."""

    def init_learned(self, site: Site, setting: Any) -> Any:
        """Differentiable arrays of a site, or None."""

    def init_state(self, site: Site, setting: Any) -> Any:
        """State of a site before the first call, or None."""

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


class Traced(NamedTuple):
    """A function traced and analysed for a transform."""

    plan: Plan
    staged: Staged
    settings: Mapping[str, Any]
    sites: tuple[Site, ...]  # all of them, also inside what is differentiated
    leaves: tuple[tuple[str, Any], ...]  # (key path, shape and dtype) of the parameters

    def run(self, arrays: Sequence, runtime: Runtime) -> Any:
        outs = evaluate(self.plan, self.staged.jaxpr, self.staged.consts, arrays, runtime)
        return self.staged.rebuild(outs)


def mark_of(transform: Transform) -> str:
    """Name of the regions that this transform emits; the same in every process."""
    return f"{MARK}{transform.kind}_{zlib.crc32(repr(transform).encode()):08x}"


def _analyze(
    fn: Callable,
    transform: Transform,
    call: Call,
    arrays: Sequence,
    labels: Sequence[Label],
    closure: Callable[[int], list[Label]],
    paths: Sequence[str],
) -> tuple[Staged, Plan, list[Site], bool]:
    """Traces and analyses: (jaxpr, plan, all sites, whether some region is ours already)."""
    autodiff.install()
    mark = mark_of(transform)

    def once(scope: autodiff.Scope):
        analyzer = Analyzer(mark)
        with autodiff.SCOPE(scope), _compat.classic_custom_rules():
            staged = stage(fn, call, arrays)
            constants = closure(len(staged.consts))
            found = analyzer.analyze(staged.jaxpr, labels, constants=constants)
        return staged, found

    first = autodiff.Scope(None)
    staged, found = once(first)
    inside: list[Site] = []
    if first.count:
        region = functools.partial(_region, transform, paths)
        second = autodiff.Scope(region, found.marks)
        staged, found = once(second)
        inside = second.sites
        if second.count != first.count:
            raise SiteError(
                f"{name_of(fn)} differentiates {first.count} functions when it is traced once "
                f"and {second.count} when it is traced again. Its trace must not depend on "
                "Python state that it changes; wrap the loss instead of the whole step."
            )
    plan = name_sites(staged.jaxpr, found, paths)
    return staged, plan, [*plan.everything, *inside], bool(found.owned)


def _region(
    transform: Transform,
    paths: Sequence[str],
    fn: Callable,
    labels: Sequence[Label] | None,
    closure: Callable[[int], list[Label]],
    scope: autodiff.Scope,
) -> Callable:
    """`fn`, which is about to be differentiated, transformed.

    `labels` is None where nothing is known of parameters: what is differentiated are they.
    """

    def transformed(*args):
        call, arrays = split((args, {}))
        known, names = labels, paths
        if labels is None:
            known, leaves = label_arguments(args, {}, range(len(args)))
            names = [path for path, _ in leaves]
        staged, plan, sites, _ = _analyze(fn, transform, call, arrays, known, closure, names)
        scope.sites += sites
        settings = transform.choose(plan.everything)
        traced = Traced(plan.select(frozenset(settings)), staged, settings, (), ())
        return traced.run(arrays, Runtime(transform, settings, {}, {}))

    if transform.stateful:
        return _named(OPAQUE, fn)
    return _named(mark_of(transform), transformed)


def _named(name: str, fn: Callable) -> Callable:
    """`fn` under a jit of this name."""

    def packed(inputs: Packed) -> Packed:
        args, kwargs = inputs.unpack()
        return Packed.pack(fn(*args, **kwargs))

    packed.__name__ = packed.__qualname__ = name
    jitted = jax.jit(packed)

    def run(*args, **kwargs):
        with autodiff.SCOPE(None):
            return jitted(Packed.pack((args, kwargs))).unpack()

    return run


def label_arguments(
    args: tuple, kwargs: dict, params: Sequence[int | str]
) -> tuple[list[Label], list[tuple[str, Any]]]:
    """Labels of the arrays of a call, and (key path, array) of the parameters by number."""
    flat, _ = jax.tree_util.tree_flatten_with_path((args, kwargs))
    heads = [getattr(path[1], "idx", getattr(path[1], "key", None)) for path, _ in flat]
    names = [key_path(path[2:]) for path, _ in flat]
    ours = [i for i, (_, x) in enumerate(flat) if heads[i] in params and is_array(x)]
    several = len({heads[i] for i in ours}) > 1
    labels, leaves = [], []
    for i, (_, x) in enumerate(flat):
        if not is_array(x):
            continue
        if heads[i] not in params:
            labels.append(DATA)
            continue
        name = names[i] or f"arg{heads[i]}"
        if several and any(names[j] == names[i] and heads[j] != heads[i] for j in ours):
            name = f"arg{heads[i]}/{names[i]}".rstrip("/")
        labels.append(Label(params=frozenset([len(leaves)])))
        leaves.append((name, x))
    return labels, leaves


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
        one = isinstance(argnums, (int, str))
        self.argnums: tuple[int | str, ...] = (argnums,) if one else tuple(argnums)

        def whole(learned: Any, state: Any, inputs: Packed):
            traced = self._trace(*inputs.unpack())
            runtime = Runtime(transform, traced.settings, learned, dict(state))
            return Packed.pack(traced.run(inputs.arrays, runtime)), runtime.state

        whole.__name__ = whole.__qualname__ = mark_of(transform)
        self._jitted = jax.jit(whole)

    def call(self, learned: Any, state: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """(result of the function, new state)."""
        with autodiff.SCOPE(None):
            out, state = self._jitted(learned, state, Packed.pack((args, kwargs)))
        return out.unpack(), state

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """Traces and analyses only. Arguments may be `jax.ShapeDtypeStruct`s."""
        with autodiff.SCOPE(None):
            return self._trace(args, kwargs)

    def _trace(self, args: tuple, kwargs: dict) -> Traced:
        params = self._params(args, kwargs)
        labels, leaves = label_arguments(args, kwargs, params)
        call, arrays = split((args, kwargs))
        paths = [path for path, _ in leaves]

        def closure(count: int) -> list[Label]:
            return [Label()] * count

        staged, plan, sites, covered = _analyze(
            self.fn, self.transform, call, arrays, labels, closure, paths
        )
        unique = tuple({(s.name, id(s.eqn)): s for s in sites}.values())
        if not covered:
            self.transform.check(unique, paths)
        settings = self.transform.choose(plan.everything)
        kept = plan.select(frozenset(settings))
        shapes = tuple((path, _shape_of(x)) for path, x in leaves)
        return Traced(kept, staged, settings, unique, shapes)

    def _params(self, args: tuple, kwargs: dict) -> tuple[int | str, ...]:
        out: list[int | str] = []
        for n in self.argnums:
            if isinstance(n, str):
                known = n in kwargs
            else:
                known = -len(args) <= n < len(args)
            if not known:
                raise JaxCompressError(
                    f"argnums={n!r} names no argument: {name_of(self.fn)} was called with "
                    f"{len(args)} positional arguments and the keywords {sorted(kwargs)}. "
                    "argnums says which arguments hold the parameters."
                )
            out.append(n % len(args) if isinstance(n, int) else n)
        return tuple(out)

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


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", None) or jnp.result_type(x))


def name_of(fn: Callable) -> str:
    """A name to call a function by in messages."""
    return getattr(fn, "__name__", type(fn).__name__)


def stateless(fn: Callable, transform: Transform, argnums: ArgNums = 0) -> Callable:
    """`fn` with a transform that has no state: same signature, same structure of results."""
    inner = Transformed(fn, transform, argnums)

    def wrapped(*args, **kwargs):
        return inner.call({}, {}, args, kwargs)[0]

    try:
        return functools.wraps(fn)(wrapped)
    except (AttributeError, TypeError):
        return wrapped
