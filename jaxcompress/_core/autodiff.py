# SPDX-License-Identifier: Apache-2.0
"""The autodiff boundary: what a function differentiates inside is transformed before that.

Inside a jaxpr, operations of a loss that was already differentiated are mixed with those of its
derivative. So a function that calls `jax.grad` (or any of its relatives) inside is traced twice
under a scope: once to learn which of the differentiated and closed-over values derive from
parameters, and once with each differentiated function replaced by its transformed self.

The scope is a `jax.make_user_context` value: it is part of the key of every cache of JAX, so
that a function that was traced before is traced again, and nothing leaks afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from . import _compat, typed
from .analysis import MARK
from .provenance import CONSTANT, Label
from .sites import Site
from .staging import Packed, Staged, split, stage

SCOPE = jax.make_user_context(None)


class Scope:
    """One tracing of a function whose inner derivatives are to be seen.

    Attributes:
      region: makes the transformed function from (fn, labels of its arrays or None where roles
        are not known, labels of what it closes over by their count, this scope).
      name: of the jit around each transformed function.
      marks: labels found by the first tracing; None during the first one.
      outer: the scope of another transform around this one, which changes what is differentiated
        after this one did.
      unknown: label of what a function closes over and the first tracing did not see.
      key: random key of the transform, as this tracing knows it, or None.
      count: how many functions were differentiated so far.
      typed: how many of them with respect to `TypedParams`.
      restored: whether an optimizer took the state out of a gradient (`note_restored`).
      sites: sites found inside them.
    """

    def __init__(
        self,
        region: Callable | None = None,
        name: str = "",
        marks: dict[str, Label] | None = None,
        outer: Scope | None = None,
        unknown: Label = CONSTANT,
    ):
        self.region, self.name, self.marks, self.outer = region, name, marks, outer
        self.unknown = unknown
        self.key: Any = None
        self.count = 0
        self.typed = 0
        self.restored = False
        self.sites: list[Site] = []


def _hook(fn: Callable, primals: tuple) -> tuple[Callable, tuple] | None:
    scope: Scope | None = SCOPE.value
    return None if scope is None else _enter(scope, fn, primals)


def _enter(scope: Scope, fn: Callable, primals: tuple) -> tuple[Callable, tuple]:
    k, scope.count = scope.count, scope.count + 1
    if typed.find(primals):
        scope.typed += 1
        fn = typed.unwrapping(fn)
    call, arrays = split((primals, {}))
    if scope.marks is None:
        with SCOPE(None):
            staged = stage(fn, call, arrays)
        arrays = [_mark(x, f"{MARK}{k}/{i}") for i, x in enumerate(arrays)]
        consts = [_mark(c, f"{MARK}{k}/closure/{i}") for i, c in enumerate(staged.consts)]
        return _again(staged, consts), call.merge(arrays)[0]

    marks, prefix = scope.marks, f"{MARK}{k}/"
    known = any(name.startswith(prefix) and label.params for name, label in marks.items())

    def label_of(name: str, unknown: Label = CONSTANT) -> Label:
        label = marks.get(prefix + name, unknown)
        # Parameters that were updated before are the parameters of what is differentiated now.
        return Label(params=label.params) if label.data and label.params else label

    ins = [label_of(str(i)) for i in range(len(arrays))] if known else None

    def closure(count: int) -> list[Label]:
        return [label_of(f"closure/{i}", scope.unknown) for i in range(count)]

    assert scope.region is not None
    fn = _named(scope, scope.region(fn, ins, closure, scope))
    if scope.outer is not None:
        fn, primals = _enter(scope.outer, fn, primals)
        fn = _named(scope, fn)  # so that this transform does not enter what the other one made
    return fn, primals


def _named(scope: Scope, fn: Callable) -> Callable:
    """`fn` under a jit with the name of the scope, traced in the context around the scope."""

    def packed(inputs: Packed) -> Packed:
        args, kwargs = inputs.unpack()
        return Packed.pack(fn(*args, **kwargs))

    packed.__name__ = packed.__qualname__ = scope.name
    jitted = jax.jit(packed)

    def run(*args, **kwargs):
        with SCOPE(scope.outer if SCOPE.value is scope else SCOPE.value):
            return jitted(Packed.pack((args, kwargs))).unpack()

    return run


def _mark(x: Any, name: str) -> Any:
    return checkpoint_name(x, name) if isinstance(x, _compat.Tracer) else x


def _again(staged: Staged, consts: list) -> Callable:
    def fn(*args):
        _, arrays = split((args, {}))
        with SCOPE(None):
            return staged.rebuild(_compat.eval_jaxpr(staged.jaxpr, consts, *arrays))

    return fn


def note_restored() -> None:
    """Tells the tracing under way that the state is taken out of the gradient and put back."""
    scope: Scope | None = SCOPE.value
    if scope is not None:
        scope.restored = True


def install() -> None:
    """Installs the hook where JAX enters autodiff, once."""
    _compat.install_autodiff_hook(_hook, _canary)


def _canary() -> bool:
    """Differentiates a one-matmul function under a scope and looks whether it was seen."""
    scope = Scope()
    with SCOPE(scope):
        jax.make_jaxpr(jax.grad(lambda w: (w @ w).sum()))(jnp.ones((2, 2)))
        jax.make_jaxpr(lambda w: jax.jvp(lambda w: w @ w, (w,), (w,)))(jnp.ones((2, 2)))
    return scope.count == 2
