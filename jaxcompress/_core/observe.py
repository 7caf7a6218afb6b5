# SPDX-License-Identifier: Apache-2.0
"""Looking at a function without changing it: its sites, and the values that pass through them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._errors import SiteError
from . import _compat, dimensions
from .patterns import matches, nearest
from .sites import Site
from .transform import ArgNums, Listing, Transform, Transformed


def sites(fn: Callable, argnums: ArgNums = 0) -> Callable[..., tuple[Site, ...]]:
    """Lists the sites of a function: its matmuls, convolutions and embedding lookups.

    Args:
      fn: any function that JAX can trace; also one that differentiates inside.
      argnums: position (or name) of the argument that holds the parameters, or several.

    Returns:
      A function of the arguments of `fn` (`jax.ShapeDtypeStruct`s will do) that returns all
      sites in program order. Nothing is computed.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> [site.name for site in sites(fn)(params, jnp.ones((2, 4)))]
    ['up', 'down']
    """
    inner = Transformed(fn, Listing(), argnums)
    return lambda *args, **kwargs: inner.trace(*args, **kwargs).sites


@dataclasses.dataclass(frozen=True)
class Tap(Transform):
    """Returns what flows into (or out of) the sites that a pattern matches, as their state."""

    pattern: str
    output: bool = False

    kind = "tap"
    stateful = True
    collects = True

    def choose(self, sites: Sequence[Site]) -> Mapping[str, Any]:
        return {s.name: True for s in sites if matches(self.pattern, s.name) and not s.opaque}

    def check(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        if not self.choose(sites):
            near = nearest(self.pattern, [s.name for s in sites])
            raise SiteError(
                f"tap: pattern {self.pattern!r} matches no site. Nearest: {near}. "
                "jaxcompress.sites(fn)(*args) lists all of them."
            )

    def init_state(self, site: Site, setting: Any) -> Any:
        if self.output:
            aval = site.out_avals[0]
        else:
            aval = site.eqn.invars[_input(site)].aval
        sizes = aval.sharding.mesh.shape  # inside shard_map, of the mesh
        split = self._split(site) or (frozenset(),) * aval.ndim
        whole = [
            n * math.prod(sizes[a] for a in axes) for n, axes in zip(aval.shape, split, strict=True)
        ]
        return jnp.zeros(whole, aval.dtype)

    def state_spec(self, site: Site, state: Any) -> Any:
        split = self._split(site)
        if split is None:
            return PartitionSpec()
        lead = (None,) * (state.ndim - len(split))
        return PartitionSpec(*lead, *(tuple(sorted(axes)) or None for axes in split))

    def _split(self, site: Site) -> tuple[frozenset[str], ...] | None:
        """Mesh axes that split each dimension of what is returned; None outside shard_map."""
        operands = [o.manual for o in site.operands]
        if not self.output or all(axes is None for axes in operands):
            return operands[_input(site)]
        axes = frozenset().union(*(a for split in operands for a in split or ()))
        rest = [None] * (len(site.eqn.invars) - len(operands))
        return dimensions.splits(site.eqn, operands + rest, axes)[0]

    def apply(self, site, setting, bind, operands, learned, state):
        out = bind(*operands)
        seen = operands[_input(site)]
        if self.output:
            seen = out[0] if isinstance(out, list) else out
            summed = () if site.op == "gather" else site.contracting(0)
            axes = site.operands[0].split_over(summed)
            seen = lax.psum(seen, axes) if axes else seen  # devices hold parts of the sum
        split = frozenset().union(*(self._split(site) or ()))
        return out, _one_copy(seen, _compat.varying_axes(seen) - split)


def _one_copy(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x, which is equal along these mesh axes, as a value that shard_map knows to be equal."""
    if not axes:
        return x
    first = functools.reduce(jnp.logical_and, [lax.axis_index(a) == 0 for a in sorted(axes)])
    return lax.psum(jnp.where(first, x, jnp.zeros_like(x)), tuple(sorted(axes)))


def _input(site: Site) -> int:
    """Position of the operand that is looked at: the activation, or the first operand."""
    roles = [o.role for o in site.operands]
    return roles.index("activation") if "activation" in roles else 0


def tap(
    fn: Callable, pattern: str, *, argnums: ArgNums = 0, output: bool = False
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Runs a function and returns also what flows into the matching sites.

    Args:
      fn: any function that JAX can trace.
      pattern: glob or `re:` regular expression on the names of sites.
      argnums: position (or name) of the argument that holds the parameters, or several.
      output: return the result of each site instead of the activation that it reads.

    Returns:
      A function of the arguments of `fn` that returns (result, {site name: array}). Inside
      scans the arrays are stacked, `[L, ...]`; inside a while loop the last value is returned;
      in a branch that was not taken, zeros.

    Raises:
      SiteError: when called, if the pattern matches no site.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> _, seen = tap(fn, "down")(params, jnp.ones((2, 4)))
    >>> {name: value.shape for name, value in seen.items()}
    {'down': (2, 8)}
    """
    inner = Transformed(fn, Tap(pattern, output), argnums)

    def tapped(*args, **kwargs):
        _, state = inner.init(*args, **kwargs)
        return inner.call({}, state, args, kwargs)

    return tapped
