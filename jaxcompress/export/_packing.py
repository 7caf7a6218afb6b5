# SPDX-License-Identifier: Apache-2.0
"""Parameters as an artifact stores them: packed as the recipe of a quantized function says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core import typed
from .._core.qtensor import QTensor, abstract, is_stored, nbytes
from .._core.sparse import SparseTensor
from .._core.staging import split
from .._core.transform import Transformed, transformed_by
from .._quantize.accounting import Row
from .._quantize.aware import QuantizeAware
from .._quantize.recipe import Recipe
from .._quantize.report import report
from .._quantize.storage import packed_params


class Packing:
    """What is done to the parameters of a function.

    Attributes:
      recipe: that of `jc.quantize_aware`; None for any other function, whose parameters are kept.
    """

    def __init__(self, fn: Callable):
        inner = transformed_by(fn)
        self.inner: Transformed | None = None
        self.recipe: Recipe | None = None
        if (
            inner is not None
            and isinstance(inner.transform, QuantizeAware)
            and inner.argnums == (0,)
        ):
            self.inner, self.recipe = inner, inner.transform.recipe

    def pack(self, params: Any, inputs: tuple) -> Any:
        """The parameters with QTensors; the function returns the same bits for them."""
        if self.inner is None or self.recipe is None:
            return params
        return packed_params(self.inner.fn, self.recipe)(params, *inputs)[0][0]

    def rows(self, named: Mapping[str, Any], params: Any, inputs: tuple) -> list[Row]:
        """Every parameter with its format, its bytes, and why if it is left alone.

        Args:
          named: the stored parameters by key path.
          params, inputs: what the function takes.
        """
        reasons = {}
        if self.inner is not None and self.recipe is not None:
            args = typed.unwrap(params), *inputs
            reasons = {
                row.site: row.reason
                or "rounded when the program runs: sites read a part of it, "
                "or what is computed from it"
                for row in report(self.inner.fn, self.recipe)(*_abstract(args)).rows
            }

        def row(name: str, x: Any) -> Row:
            packed = is_stored(x)
            fmt = x.format.name if isinstance(x, QTensor) else str(x.dtype)
            fmt = x.layout if isinstance(x, SparseTensor) else fmt
            why = reasons.get(name.removeprefix("weights/"), "stored as it was given")
            before = x.size * x.dtype.itemsize
            why = "" if packed else why
            return Row(name, "", x.shape, fmt, None, before, nbytes(x), None, why, "")

        return [row(name, x) for name, x in named.items()]


def _abstract(tree: Any) -> Any:
    call, arrays = split(tree)
    shapes = [abstract(x) if is_stored(x) else jax.eval_shape(jnp.asarray, x) for x in arrays]
    return call.merge(shapes)
