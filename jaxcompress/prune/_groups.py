# SPDX-License-Identifier: Apache-2.0
"""The coupled groups of a function: which indices of which parameters belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .._core.arguments import ArgNums
from .._core.patterns import nearest
from .._core.tabular import Tabular
from .._errors import SiteError

if TYPE_CHECKING:
    from .._core.channels import Group


@dataclasses.dataclass(frozen=True, eq=False)
class Groups(Tabular):
    """Coupled groups; a sequence that prints as a table.

    Attributes:
      groups: in the order of the parameters.
    """

    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> Group:
        """The group with a member of this name, such as `layers/0/up:1`.

        Raises:
          SiteError: there is none.
        """
        for group in self.groups:
            if name in map(str, group.members):
                return group
        known = [str(member) for group in self.groups for member in group.members]
        raise SiteError(f"no group has a member `{name}`. Nearest: {nearest(name, known)}.")

    @property
    def title(self) -> str:
        free = sum(group.pinned is None for group in self.groups)
        return f"{free} groups whose indices can be removed, {len(self.groups) - free} pinned"

    @property
    def columns(self) -> Sequence[tuple[str, bool]]:
        return (("size", True), ("layers", True), ("members", False), ("note", False))

    @property
    def cells(self) -> Sequence[Sequence[str]]:
        return [
            (
                str(group.size),
                str(group.layers or ""),
                ", ".join(map(str, group.members)),
                _note(group),
            )
            for group in self.groups
        ]


def _note(group: Group) -> str:
    if group.pinned:
        return f"pinned by {group.pinned}"
    notes = ["reduced by a norm or mean"] if group.mixed else []
    if group.ordered:
        notes.append(f"order fixed by {group.ordered}")
    return ", ".join(notes)


def groups(fn: Callable, argnums: ArgNums = 0) -> Callable[..., Groups]:
    """Lists the coupled groups of a function's parameters.

    A group is a set of indices that are removed together: hidden units with their bias, heads in
    q, k, v and the output projection, channels of a convolution with those of its norm and of
    whatever reads them, a residual stream through all layers. It is found by following axes
    through the jaxpr; a primitive that is not known pins what it touches and is named.

    Args:
      fn: a forward pass or loss.
      argnums: position or name of the argument that holds the parameters, or several.

    Returns:
      A function of the arguments of `fn` (`jax.ShapeDtypeStruct`s will do) that returns
      `Groups`. Nothing is computed.

    >>> import jax.numpy as jnp
    >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 3))}
    >>> found = groups(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])(params, jnp.ones((2, 4)))
    >>> for group in found:
    ...     print(group.size, *group.members, group.pinned)
    8 down:0 up:1 None
    3 down:1 an output
    4 up:0 an input

    References: the groups are those of DepGraph (Fang et al. 2023), found on the jaxpr.
    """
    from .._core.channels import channel_graph, coupled_groups  # it takes long to import

    return lambda *args, **kwargs: Groups(coupled_groups(channel_graph(fn, argnums, args, kwargs)))
