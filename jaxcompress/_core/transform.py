# SPDX-License-Identifier: Apache-2.0
"""What a transform is, and how it becomes a function from functions to functions."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import itertools
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._errors import JaxCompressError, RecipeError, SiteError
from . import _compat, autodiff, typed
from .analyze import MARK, OPAQUE, Analyzer
from .interpret import Runtime, evaluate
from .naming import name_sites
from .provenance import CONSTANT, DATA, Label, key_path
from .qtensor import dequantized, is_qtensor
from .sites import Plan, Site
from .staging import Call, Packed, Staged, is_array, is_float, split, stage

_TAKES_KEY = "_jaxcompress_takes"  # attribute of a transformed function: its extra keyword

ArgNums = int | str | Sequence[int | str]


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
    leaves: tuple[tuple[str, Any], ...]  # (key path, shape and dtype, or QTensor) of parameters

    def run(
        self, transform: Transform, arrays: Sequence, learned: Any, state: Any, key: Any
    ) -> tuple[Any, dict[str, Any]]:
        """(result, new state) on the arrays of a call."""
        sites, settings = self.plan.everything, self.settings
        transform.accept(sites, settings, learned, state)
        if key is not None:
            keys = {
                s.name: {**learned.get(s.name, {}), "key": _own_key(key, i, s.stack)}
                for i, s in enumerate(sites)
                if transform.draws(settings[s.name])
            }
            learned = {**learned, **keys}
        runtime = Runtime(transform, settings, learned, dict(state))
        arrays = [*_present(key), *arrays]
        outs = evaluate(self.plan, self.staged.jaxpr, self.staged.consts, arrays, runtime)
        return self.staged.rebuild(list(map(dequantized, outs))), runtime.state


def _present(key: Any) -> tuple:
    return () if key is None else (key,)


def _own_key(key: Any, i: int, stack: tuple[int, ...]) -> Any:
    """The key of the i-th site; one for each layer of the scans over stacked layers around it.

    Not by name: where a step holds its parameters is part of it.
    """
    key = jax.random.fold_in(key, i)
    return jax.random.split(key, stack) if stack else key


def mark_of(transform: Transform, argnums: Sequence[int | str] = (0,)) -> str:
    """Name of the regions that this transform emits; the same in every process.

    Other argnums than the usual make another mark: the same recipe on other parameters is not
    the same transform.
    """
    key = repr(transform) if tuple(argnums) == (0,) else repr((transform, tuple(argnums)))
    return f"{MARK}{transform.kind}_{zlib.crc32(key.encode()):08x}"


class _Found(NamedTuple):
    """A function traced and analysed."""

    staged: Staged
    plan: Plan
    sites: list[Site]  # all of them, also inside what is differentiated
    covered: bool  # whether some part was transformed like this before
    typed: bool  # whether it differentiates with respect to `TypedParams`
    restored: bool  # whether an optimizer put their state back


class _Region(NamedTuple):
    """How a function, or a part of it that is differentiated, is traced and analysed."""

    transform: Transform
    mark: str

    def analyze(
        self,
        fn: Callable,
        call: Call,
        arrays: Sequence,
        labels: Sequence[Label],
        closure: Callable[[int], list[Label]],
        paths: Sequence[str],
        key: Any,
    ) -> _Found:
        autodiff.install()
        leading = _present(key)
        labels = [*(CONSTANT for _ in leading), *labels]

        def once(scope: autodiff.Scope):
            analyzer = Analyzer(self.mark)

            # The key is an input of the jaxpr, not something that `fn` closes over: what that
            # is has been labelled by position.
            def keyed(*args, **kwargs):
                scope.key, *args = args if leading else (None, *args)
                return fn(*args, **kwargs)

            with autodiff.SCOPE(scope), _compat.classic_custom_rules():
                staged = stage(keyed, call, arrays, leading)
                constants = closure(len(staged.consts))
                found = analyzer.analyze(staged.jaxpr, labels, constants=constants)
            return staged, found

        outer = autodiff.SCOPE.value
        first = last = autodiff.Scope()
        staged, found = once(first)
        covered = bool(found.owned)  # by whoever wrote the function, not by us below
        if first.count:
            hidden = self.transform.stateful and not self.transform.travels
            name = OPAQUE if hidden else self.mark
            region = functools.partial(self.differentiated, paths)
            second = last = autodiff.Scope(region, name, found.marks, outer)
            staged, found = once(second)
            if second.count != first.count:
                raise SiteError(
                    f"{name_of(fn)} differentiates {first.count} functions when it is traced once "
                    f"and {second.count} when it is traced again. Its trace must not depend on "
                    "Python state that it changes; wrap the loss instead of the whole step."
                )
        plan = name_sites(staged.jaxpr, found, paths)
        everything = [*plan.everything, *last.sites]
        return _Found(staged, plan, everything, covered, last.typed > 0, last.restored)

    def differentiated(
        self,
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
            held = typed.only(args) if typed.find(args) else None
            plain = typed.unwrap(args)
            call, arrays = split((plain, {}))
            names, around = paths, closure
            if held is not None and held.weights is not None:
                own, leaves = label_arguments((held.weights,), {}, (0,))
                names, known = [path for path, _ in leaves], typed.labels_of(args, own)
                around = _foreign(closure)
            elif labels is None:
                ours = [i for i, x in enumerate(args) if not held or typed.find(x)]
                known, leaves = label_arguments(plain, {}, ours)
                names = [_plain_path(path) for path, _ in leaves]
            else:
                known = labels
            found = self.analyze(fn, call, arrays, known, around, names, scope.key)
            scope.sites += found.sites
            settings = self.transform.choose(found.plan.everything)
            kept = found.plan.select(frozenset(settings))
            traced = Traced(kept, found.staged, settings, (), ())
            learned = held.learned if held else {}
            state = jax.lax.stop_gradient(held.statistics["ranges"]) if held else {}
            out, state = traced.run(self.transform, arrays, learned, state, scope.key)
            return typed.deliver(out, held, state) if held else out

        return fn if self.transform.stateful and not self.transform.travels else transformed


def _plain_path(path: str) -> str:
    """The path without the containers in which `nnx.grad` hands over the state of a model."""
    return re.sub(r"^(arg\d+/)?states/\d+/", r"\1", path)


def _foreign(closure: Callable[[int], list[Label]]) -> Callable[[int], list[Label]]:
    """What is closed over beside typed parameters: constants, or data, but no parameters."""
    return lambda count: [DATA if x.data or x.params else x for x in closure(count)]


def label_arguments(
    args: tuple, kwargs: dict, params: Sequence[int | str], floats: bool = True
) -> tuple[list[Label], list[tuple[str, Any]]]:
    """Labels of the arrays of a call, and (key path, array) of the parameters by number.

    Key paths differ: two that read the same (`{"a/b": x}` and `{"a": {"b": y}}`) are spelled out
    as `['a/b']` and `['a']['b']`, and those of several arguments start with `arg0/`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_qtensor)
    flat = [(path, x) for path, x in flat if is_array(x, floats)]
    heads = [getattr(path[1], "idx", getattr(path[1], "key", None)) for path, _ in flat]
    ours = [i for i, head in enumerate(heads) if head in params]
    names = {i: key_path(flat[i][0][2:]) for i in ours}
    for i in _ambiguous(names, lambda i: heads[i]):
        names[i] = jax.tree_util.keystr(flat[i][0][2:])
    shared = set(_ambiguous(names, lambda i: ""))
    for i in ours:
        if i in shared or not names[i]:
            names[i] = f"arg{heads[i]}/{names[i]}".rstrip("/")
    numbers = {i: n for n, i in enumerate(ours)}
    labels = [
        Label(params=frozenset([numbers[i]])) if i in numbers else DATA for i in range(len(flat))
    ]
    return labels, [(names[i], flat[i][1]) for i in ours]


def _ambiguous(names: Mapping[int, str], group: Callable[[int], Any]) -> list[int]:
    """Those whose name is another's too within their group, or ends like `#1`, as a reuse does."""
    count = collections.Counter((group(i), name) for i, name in names.items())
    return [i for i, n in names.items() if count[group(i), n] > 1 or re.search(r"#\d+$", n)]


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
        self.argnums = _positions(argnums)
        self.floats = True  # whether Python floats are arrays to the function
        self.region = _Region(transform, mark_of(transform, self.argnums))

        def whole(learned: Any, state: Any, key: Any, inputs: Packed):
            traced = self._trace(inputs, key)
            out, state = traced.run(transform, inputs.arrays, learned, state, key)
            return Packed.pack(out), state

        whole.__name__ = whole.__qualname__ = self.region.mark
        self._jitted = jax.jit(whole)

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
        params = self._params(args, kwargs)
        floats = len(split((args, kwargs))[1]) == len(inputs.arrays)
        labels, leaves = label_arguments(args, kwargs, params, floats)
        paths = [path for path, _ in leaves]

        def closure(count: int) -> list[Label]:
            return [Label()] * count

        arrays = inputs.arrays
        found = self.region.analyze(self.fn, inputs.call, arrays, labels, closure, paths, key)
        unique = _distinct(found.sites)
        if not found.covered:
            self.transform.check(unique, paths)
        settings = self.transform.choose(found.plan.everything)
        kept = found.plan.select(frozenset(settings))
        shapes = tuple((path, _shape_of(x)) for path, x in leaves)
        return Traced(kept, found.staged, settings, unique, shapes)

    def parameters(self, args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
        """(key path, array) of each parameter among the arguments of a call."""
        return label_arguments(args, kwargs, self._params(args, kwargs), self.floats)[1]

    def replace(self, new: Mapping[str, Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a call with other values for the parameters of these key paths."""
        call, arrays = split((args, kwargs), self.floats)
        labels, leaves = label_arguments(args, kwargs, self._params(args, kwargs), self.floats)
        paths = iter(path for path, _ in leaves)
        named = [next(paths) if label.params else None for label in labels]
        merged = [new.get(n, x) if n else x for n, x in zip(named, arrays, strict=True)]
        return call.merge(merged)

    def _params(self, args: tuple, kwargs: dict) -> tuple[int | str, ...]:
        """Which arguments of a call hold the parameters: positions, or names of keywords."""
        names = _positional_names(self.fn)
        out: list[int | str] = []
        for n in self.argnums:
            if isinstance(n, str) and n not in kwargs and n in names[: len(args)]:
                n = names.index(n)
            elif isinstance(n, int) and len(args) <= n < len(names) and names[n] in kwargs:
                n = names[n]
            if n not in kwargs if isinstance(n, str) else not -len(args) <= n < len(args):
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


def _positions(argnums: ArgNums) -> tuple[int | str, ...]:
    """`argnums` as a tuple of positions and names.

    Raises:
      JaxCompressError: it is something else.
    """
    given = (argnums,) if isinstance(argnums, (int, str)) else argnums
    kinds = [type(n) for n in given] if isinstance(given, Sequence) else []
    if not kinds or not all(kind in (int, str) for kind in kinds):
        raise JaxCompressError(
            f"argnums={argnums!r}: expected the position or the name of the argument that holds "
            "the parameters, or several of them."
        )
    return tuple(given)


def _positional_names(fn: Callable) -> list[str]:
    """Names of the arguments that may be given by position, as far as the signature says."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in kinds]


def _distinct(sites: Sequence[Site]) -> tuple[Site, ...]:
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
    if is_qtensor(x):
        return jax.eval_shape(lambda q: q, x)
    return jax.ShapeDtypeStruct(jnp.shape(x), getattr(x, "dtype", None) or jnp.result_type(x))


def name_of(fn: Callable) -> str:
    """A name to call a function by in messages."""
    return getattr(fn, "__name__", type(fn).__name__)


def _takes(fn: Callable, keyword: str) -> bool:
    """Whether a function takes a keyword argument of this name, as far as its signature says."""
    if getattr(fn, _TAKES_KEY, None) == keyword:
        return True
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return True
    return keyword in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def take_key(fn: Callable, transform: Transform, kwargs: dict[str, Any]) -> Any:
    """Takes the random key of a transform out of the keyword arguments of a call; None if absent.

    Raises:
      RecipeError: it is no key, or nothing is random.
    """
    if transform.keyword not in kwargs:
        return None
    if not transform.random:
        if _takes(fn, transform.keyword):
            return None
        raise RecipeError(
            f"{transform.keyword}= was given to {name_of(fn)}, and nothing in it is rounded at "
            'random: no rule has a gradient with rounding="stochastic". Leave it out.'
        )
    key = kwargs.pop(transform.keyword)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed_key else dtype == jnp.uint32 and shape == (2,)):
        found = type(key).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
        raise RecipeError(
            f"{transform.keyword}= takes one random key, jax.random.key(seed), found {found}. "
            "Give a new one at every step: jax.random.fold_in(key, step)."
        )
    return key


def transformed_function(fn: Callable, transform: Transform, argnums: ArgNums = 0) -> Callable:
    """`fn` with a transform: same signature, same structure of results.

    State, if the transform has any, comes and goes with `TypedParams` among the arguments.
    """
    from .step import MutatingStep, TypedCall  # they build on this module

    inner = Transformed(fn, transform, argnums)
    typed_call, mutating = TypedCall(inner), MutatingStep(inner)

    def wrapped(*args, **kwargs):
        key = take_key(fn, transform, kwargs)
        if mutating.wanted(args, kwargs):
            return mutating(args, kwargs, key)
        if typed.find((args, kwargs)):
            return typed_call(args, kwargs, key)
        return inner.call({}, {}, args, kwargs, key)[0]

    with contextlib.suppress(AttributeError, TypeError):
        wrapped = functools.wraps(fn)(wrapped)
    if transform.random:
        setattr(wrapped, _TAKES_KEY, transform.keyword)
    setattr(wrapped, _INNER, (inner, wrapped))  # wrappers of a wrapper copy its attributes
    return wrapped


_INNER = "_jaxcompress"


def transformed_by(fn: Callable) -> Transformed | None:
    """What `transformed_function` made `fn` of, also under `jax.jit`; None if it did not."""
    if isinstance(fn, jax.stages.Wrapped):
        fn = getattr(fn, "__wrapped__", fn)
    inner, wrapped = getattr(fn, _INNER, (None, None))
    return inner if wrapped is fn else None
