# SPDX-License-Identifier: Apache-2.0
"""Looking at a function without changing it: its sites, and the values that pass through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._errors import SiteError
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

    def check(self, sites: Sequence[Site], parameters: Sequence[tuple[str, Any]]) -> None:
        if not self.choose(sites):
            near = nearest(self.pattern, [s.name for s in sites])
            raise SiteError(
                f"tap: pattern {self.pattern!r} matches no site. Nearest: {near}. "
                "jaxcompress.sites(fn)(*args) lists all of them."
            )

    def init_state(self, site: Site, setting: Any) -> Any:
        aval = site.out_avals[0] if self.output else site.operands[_input(site)]
        return jnp.zeros(aval.shape, aval.dtype)

    def state_spec(self, site: Site, state: Any) -> Any:
        manual = site.operands[_input(site)].manual
        if self.output or manual is None:
            return PartitionSpec()
        lead = (None,) * (state.ndim - len(manual))
        return PartitionSpec(*lead, *(tuple(sorted(axes)) or None for axes in manual))

    def apply(self, site, setting, bind, operands, learned, state):
        out = bind(*operands)
        first = out[0] if isinstance(out, list) else out
        return out, first if self.output else operands[_input(site)]


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
