# SPDX-License-Identifier: Apache-2.0
"""Calls that need more than a plain function of arrays: typed parameters, objects that mutate."""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer

from .._errors import RecipeError
from . import autodiff, typed
from .analyze import Analyzer
from .arguments import label_arguments, name_of
from .provenance import CONSTANT, DATA, Label
from .region import Traced
from .staging import Packed, Staged, split, stage
from .transform import Transformed, distinct

_WEIGHT_LEAF = Label(params=frozenset([0]))


class TypedCall:
    """Calls a function with `TypedParams` among its arguments.

    A function that differentiates with respect to them is a step: it gets them as they are, and
    only what it differentiates is transformed. Any other function sees the weights alone and is
    transformed as a whole; its derivative delivers the new state.
    """

    def __init__(self, inner: Transformed):
        self.inner = inner
        self.looks = 2  # at the values of the first calls; each look waits for the device

        def whole(key: Any, inputs: Packed) -> Packed:
            run = self._step if self._is_step(inputs) else self._plain
            return Packed.pack(run(inputs, key))

        whole.__name__ = whole.__qualname__ = inner.region.mark
        self._jitted = jax.jit(whole)

    def __call__(self, args: tuple, kwargs: dict, key: Any = None) -> Any:
        if self.looks:
            self.looks -= 1
            _check_weight(typed.find((args, kwargs))[0])
        run = functools.partial(self._jitted, key)
        return self.inner._with_floats(run, args, kwargs).unpack()

    def _is_step(self, inputs: Packed) -> bool:
        autodiff.install()
        scope = autodiff.Scope()
        try:
            with autodiff.SCOPE(scope):
                stage(self.inner.fn, inputs.call, inputs.arrays)
        except Exception:
            # A forward pass cannot read typed parameters, and fails as it likes to. Then it is
            # traced with the weights alone, and what fails there is the caller's to see.
            if scope.typed:
                raise
        return scope.typed > 0

    def _plain(self, inputs: Packed, key: Any) -> Any:
        inner, (args, kwargs) = self.inner, inputs.unpack()
        held = typed.only((args, kwargs))
        floats = len(split((args, kwargs))[1]) == len(inputs.arrays)
        own, leaves = self._parameters(held, args, kwargs, floats)
        if held.weights is not None:
            own = typed.labels_of((args, kwargs), own, floats)
        labels, paths = own, [path for path, _ in leaves]
        call, arrays = split(typed.unwrap((args, kwargs)), floats)
        found = inner.region.analyze(inner.fn, call, arrays, labels, _constants, paths, key)
        sites = distinct(found.sites)
        if not found.covered:
            inner.transform.check(sites, paths)
        settings = inner.transform.choose(found.plan.everything)
        kept = found.plan.select(frozenset(settings))
        state = jax.lax.stop_gradient(held.statistics["ranges"])
        traced = Traced(kept, found.staged, settings, sites, ())
        out, state = traced.run(inner.transform, arrays, held.learned, state, key)
        return typed.deliver(out, held, state)

    def _parameters(self, held: typed.TypedParams, args: tuple, kwargs: dict, floats: bool = True):
        """`label_arguments` of the weights, or of the arguments if these hold them themselves."""
        if held.weights is not None:
            return label_arguments((held.weights,), {}, (0,))
        return label_arguments(args, kwargs, self.inner.params_of(args, kwargs), floats)

    def _step(self, inputs: Packed, key: Any) -> Any:
        inner, (args, kwargs) = self.inner, inputs.unpack()
        arrays, labels = inputs.arrays, [DATA] * len(inputs.arrays)
        found = inner.region.analyze(inner.fn, inputs.call, arrays, labels, _constants, (), key)
        if not found.covered:
            held = typed.find((args, kwargs))[0]
            paths = [path for path, _ in self._parameters(held, args, kwargs)[1]]
            inner.transform.check(distinct(found.sites), paths)
        if not found.restored and _is_updated(found.staged, inputs):
            raise _not_wrapped(inner)
        traced = Traced(found.plan.select(frozenset()), found.staged, {}, (), ())
        return traced.run(inner.transform, arrays, {}, {}, key)[0]


def _not_wrapped(inner: Transformed) -> RecipeError:
    return RecipeError(
        f"{name_of(inner.fn)} updates QuantParams with an optimizer that was not wrapped: "
        "it would descend along the statistics. Use jaxcompress.quant_tx(optimizer) where "
        "the optimizer is made, outermost."
    )


def _constants(count: int) -> list[Label]:
    return [CONSTANT] * count


def _check_weight(held: typed.TypedParams) -> None:
    """Raises if the scalar that is zero by definition says that the statistics were spoilt."""
    weight = held.statistics["weight"]
    known = isinstance(weight, jax.Array) and not isinstance(weight, Tracer)
    if not known or not weight.is_fully_addressable or float(weight) == 0:
        return
    if math.isnan(float(weight)):
        raise RecipeError(
            "the statistics of these QuantParams were lost: their gradients were rescaled leaf by "
            "leaf before jaxcompress.quant_tx saw them. Rescale inside of it, as in "
            "quant_tx(optax.chain(rescale, optimizer)), and start again from "
            "jaxcompress.quant_params."
        )
    raise RecipeError(
        "these QuantParams were changed by an optimizer that descended along their "
        "statistics. Use jaxcompress.quant_tx(optimizer) and start again from "
        "jaxcompress.quant_params."
    )


def _is_updated(staged: Staged, inputs: Packed) -> bool:
    """Whether typed parameters that come out were computed from some that came in."""
    flags = jax.tree.map(lambda _: CONSTANT, inputs)
    args, kwargs = flags.unpack()
    for held in typed.find((args, kwargs)):
        held.statistics["weight"] = _WEIGHT_LEAF
    leaves = jax.tree.leaves((args, kwargs), is_leaf=_is_label)
    labels = [x for x in leaves if _is_label(x)]
    labels = [CONSTANT] * (len(staged.jaxpr.invars) - len(labels)) + labels  # a random key leads
    outputs = Analyzer().analyze(staged.jaxpr, labels).outputs
    unchanged = set(map(id, staged.jaxpr.invars))
    outputs = [
        CONSTANT if id(v) in unchanged else label
        for v, label in zip(staged.jaxpr.outvars, outputs, strict=True)
    ]
    return any(
        held.statistics["weight"].params
        for held in typed.find(staged.rebuild(outputs))
        if _is_label(held.statistics["weight"])
    )


def _is_label(x: Any) -> bool:
    return isinstance(x, Label)


class MutatingStep:
    """Calls a step that changes its arguments in place: Flax NNX models and optimizers.

    They are not taken apart: the step runs as it is, and only what it differentiates is
    transformed. What it differentiates are the parameters; what it closes over is data. State
    comes and goes with a variable of the model.
    """

    def __init__(self, inner: Transformed):
        self.inner = inner
        self.scope = self._scope(None)
        self.known: dict[Any, bool] = {}
        self.keyed: dict[Any, Callable] = {}
        self.looks = 2  # as above

    def _scope(self, outer: autodiff.Scope | None) -> autodiff.Scope:
        region = functools.partial(self.inner.region.differentiated, ())
        return autodiff.Scope(region, self.inner.region.mark, {}, outer, DATA)

    def wanted(self, args: tuple, kwargs: dict) -> bool:
        """Whether arguments are NNX objects that the function differentiates and changes."""
        if not _holds_objects((args, kwargs)):
            return False
        call = split((args, kwargs))[0]
        if call not in self.known:
            self.known[call] = _differentiates_and_mutates(self.inner, args, kwargs)
        return self.known[call]

    def __call__(self, args: tuple, kwargs: dict, key: Any = None) -> Any:
        if self.looks and (held := typed.find((args, kwargs))):
            self.looks -= 1
            _check_weight(held[0])
        if key is not None:
            return self._with_key(key, args, kwargs)
        outer = autodiff.SCOPE.value
        return self._run(self.scope if outer is None else self._scope(outer), args, kwargs)

    def _with_key(self, key: Any, args: tuple, kwargs: dict) -> Any:
        """Runs the step under a jit that takes the key.

        What the caller compiled would keep the key that it was traced with. Under this jit it is
        traced again, in a scope of its own, with the key as an input.
        """
        call, given = split((args, kwargs))[0], {**dict(enumerate(args)), **kwargs}
        if call not in self.keyed:
            fixed = {name: x for name, x in given.items() if not split(x)[1]}

            def run(key: Any, objects: dict) -> Any:
                scope = self._scope(autodiff.SCOPE.value)
                scope.key, every = key, {**fixed, **objects}
                named = {name: every.pop(name) for name in kwargs}
                return self._run(scope, tuple(every[i] for i in range(len(args))), named)

            self.keyed[call] = sys.modules["flax.nnx"].jit(run)
        return self.keyed[call](key, {name: x for name, x in given.items() if split(x)[1]})

    def _run(self, scope: autodiff.Scope, args: tuple, kwargs: dict) -> Any:
        scope.sites.clear()
        with autodiff.SCOPE(scope):
            out = self.inner.fn(*args, **kwargs)
        if scope.sites:  # none where everything was compiled before
            sites: Sequence = distinct(scope.sites)
            self.inner.transform.check(sites, [])
        return out


def _holds_objects(tree: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    objects = (nnx.Module, nnx.Optimizer)
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, objects))
    return any(isinstance(x, objects) for x in found)


def _differentiates_and_mutates(inner: Transformed, args: tuple, kwargs: dict) -> bool:
    autodiff.install()
    scope, changed, descended = autodiff.Scope(), [], []

    def watched(*args, **kwargs):  # on copies: the arguments themselves do not change
        def look():
            held = [x.statistics["weight"] for x in typed.find((args, kwargs))]
            return split((args, kwargs))[1], held

        before, old = look()
        inner.fn(*args, **kwargs)
        after, new = look()
        changed[:] = [len(before) != len(after) or any(map(operator.is_not, before, after))]
        descended[:] = [any(map(operator.is_not, old, new))]

    with autodiff.SCOPE(scope):
        inner._with_floats(lambda x: stage(watched, x.call, x.arrays), args, kwargs)
    if scope.typed and descended[0] and not scope.restored:
        raise _not_wrapped(inner)
    return scope.count > 0 and changed[0]
