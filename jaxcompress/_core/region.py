# SPDX-License-Identifier: Apache-2.0
"""A function, or a part of it that is differentiated, traced and analysed for a transform."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from .._errors import SiteError
from . import _compat, autodiff, typed
from .analysis import OPAQUE
from .analyze import Analyzer
from .arguments import label_arguments, name_of
from .interpret import Runtime, evaluate
from .keys import own_key
from .naming import name_sites
from .provenance import CONSTANT, DATA, Label
from .qtensor import dequantized
from .sites import Plan, Site
from .sparse import is_sparse
from .staging import Call, Staged, split, stage

if TYPE_CHECKING:
    from .transform import Transform


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
                s.name: {**learned.get(s.name, {}), "key": own_key(key, i, s.stack)}
                for i, s in enumerate(sites)
                if transform.draws(settings[s.name])
            }
            learned = {**learned, **keys}
        runtime = Runtime(transform, settings, learned, dict(state))
        arrays = [*_present(key), *(x.opened() if is_sparse(x) else x for x in arrays)]
        outs = evaluate(self.plan, self.staged.jaxpr, self.staged.consts, arrays, runtime)
        return self.staged.rebuild(list(map(dequantized, outs))), runtime.state


def _present(key: Any) -> tuple:
    return () if key is None else (key,)


class _Found(NamedTuple):
    """A function traced and analysed."""

    staged: Staged
    plan: Plan
    sites: list[Site]  # all of them, also inside what is differentiated
    covered: bool  # whether some part was transformed like this before
    typed: bool  # whether it differentiates with respect to `TypedParams`
    restored: bool  # whether an optimizer put their state back


class Region(NamedTuple):
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
