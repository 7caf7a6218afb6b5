# SPDX-License-Identifier: Apache-2.0
"""The parameters of an analysed call, by number, in what stands at argnums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from ..._errors import SiteError
from ..arguments import ArgNums, chosen, positions
from ..qtensor import is_qtensor
from ..staging import split
from .graph import Graph


@dataclasses.dataclass(frozen=True)
class ParamTree:
    """How the parameters are found in what stands at argnums."""

    arguments: tuple[int | str, ...]  # positions and names
    order: tuple[int, ...] | None  # of several arguments, their order in the call
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def split(self, params: Any) -> tuple[Any, list]:
        whole = params
        if self.order is not None:
            whole = tuple(params[k] for k in self.order)
        call, flat = split(whole)
        found = [tuple(jnp.shape(x)) for x in flat]
        if found != list(self.shapes):
            raise SiteError(
                f"these are not the parameters of the analysis: expected {len(self.shapes)} arrays "
                f"{_abbreviated(self.shapes)}, found {len(found)} {_abbreviated(found)}. Give what "
                "stands at argnums, a tuple if argnums is several."
            )
        for path, x in zip(self.paths, flat):
            if is_qtensor(x):
                raise SiteError(
                    f"`{path}` is a QTensor, which cannot be scaled exactly. Scale the float "
                    "parameters, then quantize."
                )
        return call, flat

    def arrays(self, params: Any) -> list:
        """The parameters by number."""
        return self.split(params)[1]

    def merge(self, call: Any, flat: list) -> Any:
        whole = call.merge(flat)
        if self.order is None:
            return whole
        back = dict(zip(self.order, whole))
        return tuple(back[k] for k in range(len(whole)))


def _abbreviated(shapes: Sequence) -> str:
    return f"[{', '.join(str(list(s)) for s in shapes[:3])}{', ...' if len(shapes) > 3 else ''}]"


def param_tree(
    graph: Graph, fn: Callable, argnums: ArgNums, args: tuple, kwargs: dict
) -> ParamTree:
    """How the parameters of a call are found again."""
    arguments = chosen(fn, positions(argnums), args, kwargs)
    order = None
    if not isinstance(argnums, (int, str)):
        # Parameters are numbered as the arguments of the call are: by position, then by name.
        place = [(isinstance(n, str), n) for n in arguments]
        order = tuple(sorted(range(len(place)), key=place.__getitem__))
    return ParamTree(arguments, order, tuple(graph.paths), tuple(graph.shapes))
