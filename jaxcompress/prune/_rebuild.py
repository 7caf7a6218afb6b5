# SPDX-License-Identifier: Apache-2.0
"""The parameters of a small function in a module that was built again with its sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._core.patterns import nearest
from .._core.provenance import key_path
from .._errors import SiteError


def rebuild(module_params: Any, small_params: Any) -> Any:
    """The small parameters in the tree of a module that has their sizes.

    `shrink(...).report.configuration` prints these sizes. The module needs no jaxcompress any more;
    it computes the same where its code reads sizes off its own fields.

    Args:
      module_params: parameters of the new module, as its `init` makes them, or their shapes.
      small_params: of `jaxcompress.prune.shrink`; paths must be the same.

    Returns:
      The structure of `module_params` with the arrays of `small_params`, in the dtypes of the
      former.

    Raises:
      SiteError: a parameter is missing on either side, or has another shape.

    >>> rebuild({"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, {"w": jnp.ones(2)})
    {'w': Array([1., 1.], dtype=float32)}
    """
    known = {key_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(small_params)[0]}
    flat, tree = jax.tree_util.tree_flatten_with_path(module_params)
    names = [key_path(path) for path, _ in flat]
    for a, b, which in ((names, known, "the small function"), (known, names, "the module")):
        if missing := [name for name in a if name not in b]:
            raise SiteError(
                f"rebuild: {which} has no parameter `{missing[0]}`. Nearest: "
                f"{nearest(missing[0], b)}."
            )
    out = []
    for name, (_, old) in zip(names, flat, strict=True):
        new = known[name]
        if jnp.shape(old) != jnp.shape(new):
            raise SiteError(
                f"rebuild: `{name}` of the module is {list(jnp.shape(old))}, the small one "
                f"{list(jnp.shape(new))}. Build the module with the sizes that "
                "report.configuration prints."
            )
        out.append(jnp.asarray(new, getattr(old, "dtype", None)))
    return jax.tree_util.tree_unflatten(tree, out)
