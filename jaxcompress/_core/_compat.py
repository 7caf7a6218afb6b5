# SPDX-License-Identifier: Apache-2.0
"""Every private name and every version difference of JAX, and nowhere else.

Supported: jax 0.10 to 0.12. What differs between them: nested jaxprs (`ClosedJaxpr` against a
merged `Jaxpr` with `.consts`), the parameters of scan, the results of a custom_vjp's backward
function, and the hijax forms of the custom rules.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax._src import api as _api
from jax._src import config as _config
from jax._src import source_info_util as _source
from jax._src.interpreters import mlir as _mlir
from jax._src.interpreters import partial_eval as _pe
from jax.core import Tracer as Tracer
from jax.core import eval_jaxpr as eval_jaxpr
from jax.extend.core import Primitive

from .._errors import JaxCompressError

# Whether `lax.scaled_dot` lowers for several platforms at once: its decomposition takes one
# operand too many for that on jax 0.10.
SCALED_DOT = jax.__version_info__ >= (0, 12)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list]:
    """The jaxpr itself and its constants, whether it comes closed, open or merged."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def inner_jaxprs(params: dict) -> Iterator[Any]:
    """All jaxprs among the parameters of an equation."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item


def split_scan(params: dict, values: list) -> tuple[list, list, list]:
    """Operands of a scan as (constants, initial carry, scanned over)."""
    if "ft_in" in params:
        consts, carry, xs = params["ft_in"].update(list(values)).unpack()
        return list(consts), list(carry), list(xs)
    n, k = params["num_consts"], params["num_carry"]
    return values[:n], values[n : n + k], values[n + k :]


def is_unspecified(sharding: Any) -> bool:
    """Whether a sharding of a jit equation was left open."""
    return type(sharding).__name__ == "UnspecifiedValue"


def bind(eqn: Any, values: list) -> list:
    """Runs an equation unchanged on new operands."""
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes over which a value inside `shard_map` is known to differ."""
    return frozenset(getattr(jax.typeof(x).manual_axis_type, "varying", ()))


def second_result(eqn: Any) -> tuple[Any, list[bool]] | None:
    """The jaxpr of the second of two results of a jit around a custom_jvp call, and which of its
    operands it reads; None if that is not what the equation is (it was differentiated)."""
    eqns = open_jaxpr(eqn.params["jaxpr"])[0].eqns
    if len(eqns) != 1 or eqns[0].primitive.name != "custom_jvp_call":
        return None
    jaxpr, consts = open_jaxpr(eqns[0].params["call_jaxpr"])
    if len(jaxpr.outvars) != 2 or consts:
        return None
    inner, used = _pe.dce_jaxpr(jaxpr, [False, True])
    return inner, list(used)


@contextlib.contextmanager
def equation_scope(eqn: Any) -> Iterator[None]:
    """The name stack, source line and configuration that the equation was traced under."""
    info = eqn.source_info
    stack = _source.current_name_stack() + info.name_stack
    with _source.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def source_line(eqn: Any) -> str:
    """`file:line (function)` of the user's code that made the equation."""
    return _source.summarize(eqn.source_info)


def new_primitive(name: str, function: Callable, settings: tuple[str, ...]) -> Any:
    """A primitive that is seen in jaxprs, has the type of its first operand, and computes
    `function`; settings are static."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function, static_argnames=settings))
    primitive.def_abstract_eval(lambda x, *_, **__: x)
    _mlir.register_lowering(primitive, _mlir.lower_fun(function, multiple_results=False))
    return primitive


def function_name(jaxpr: Any) -> str:
    """Name of the Python function that a jaxpr was traced from."""
    info = getattr(open_jaxpr(jaxpr)[0], "debug_info", None)
    return (getattr(info, "func_src_info", None) or "").split(" ")[0]


def classic_custom_rules() -> contextlib.ExitStack:
    """Traces custom_vjp and custom_jvp into their classic primitives, flags or not."""
    stack = contextlib.ExitStack()
    for name in ("custom_vjp3", "custom_jvp3"):
        if hasattr(_config, name):
            stack.enter_context(getattr(_config, name)(False))
    return stack


def call_jvp_rule(params: dict, count: int) -> tuple[Any, list, list[bool]]:
    """The user's rule of a custom_jvp call: (jaxpr, constants, which tangents are zero)."""
    return params["jvp_jaxpr_fun"].call_wrapped(*[False] * (count - params["num_consts"]))


class ForwardRule(NamedTuple):
    """The user's forward rule of a custom_vjp call; `leading` come before its arguments."""

    jaxpr: Any
    leading: list


def call_forward_rule(params: dict, count: int) -> ForwardRule:
    """Traces the user's forward rule; what it closes over become leading arguments."""
    thunk = params["fwd_jaxpr_thunk"].call_wrapped(*[True] * (count - params["num_consts"]))
    jaxpr, consts = thunk
    inner, merged = open_jaxpr(jaxpr)
    if inner.constvars:
        inner = _pe.convert_constvars_jaxpr(inner)
    return ForwardRule(inner, list(consts) or merged)


def backward_function(params: dict) -> Any:
    """The user's backward rule of a custom_vjp call: it tells which function is called."""
    rule = params["bwd"].f
    while isinstance(rule, functools.partial):
        rule = rule.func
    return rule


def traced_variable(x: Any) -> Any:
    """The variable of a jaxpr that a tracer stands for; None for a value."""
    return getattr(x, "val", None) if isinstance(x, Tracer) else None


def forwarded_residuals(params: dict) -> list:
    """For each residual of a custom_vjp: the index of the input it is, or None."""
    return params["out_trees"]()[2]


def call_backward_rule(params: dict, residuals: list, cotangents: list) -> list:
    """The user's backward rule of a custom_vjp call; None stands for a zero cotangent."""
    out = params["bwd"].call_wrapped(*residuals, *cotangents)
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], (list, tuple)):
        out = out[0]  # jax 0.12 returns (cotangents, logs)
    zero = ("Zero", "SymbolicZero")
    return [None if c is None or type(c).__name__ in zero else c for c in out]


# The one hook into JAX: what `jax.grad` and its relatives differentiate passes through `hook`.

Hook = Callable[[Callable, tuple], tuple[Callable, tuple] | None]


class _HookedAD(types.ModuleType):
    """Stands for `jax._src.interpreters.ad` inside `jax._src.api`, and only there."""

    def __init__(self, real: types.ModuleType, hook: Hook):
        super().__init__(real.__name__)
        self._real = real
        for name in ("linearize", "jvp"):
            setattr(self, name, _hooked(getattr(real, name), hook))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _hooked(original: Callable, hook: Hook) -> Callable:
    @functools.wraps(original)
    def entry(fn, primals, *args, **kwargs):
        changed = hook(fn, primals.unflatten())
        if changed is None:
            return original(fn, primals, *args, **kwargs)
        fn, values = changed
        return original(fn, primals.update(jax.tree.leaves(values)), *args, **kwargs)

    return entry


def install_autodiff_hook(hook: Hook, canary: Callable[[], bool]) -> None:
    """Installs `hook` where `jax._src.api` enters autodiff, once, and checks that it fires.

    `hook(fn, primals)` returns None (leave alone) or what to differentiate instead. It must
    leave alone whatever runs outside a jaxcompress scope.

    Raises:
      JaxCompressError: if the hook does not fire on this version of JAX.
    """
    real = getattr(_api, "ad")  # noqa: B009
    if isinstance(real, _HookedAD):
        return
    setattr(_api, "ad", _HookedAD(real, hook))  # noqa: B010
    if not canary():
        setattr(_api, "ad", real)  # noqa: B010
        raise JaxCompressError(
            f"the autodiff hook did not fire on jax {jax.__version__}: functions that are "
            "differentiated inside another function cannot be transformed. Wrap the loss "
            "instead: jax.grad(jaxcompress.quantize_aware(loss, recipe))."
        )
