# SPDX-License-Identifier: Apache-2.0
"""A mask at rest: one bit for each weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import formats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Bits:
    """A bool array of at least one axis, packed eight to a byte along its last axis.

    Attributes:
      packed: uint8[..., ceil(last / 8)].
      last: size of the last axis.

    >>> bits = Bits.of(jnp.array([[True, False, True]]))
    >>> bits.packed.tolist(), bits.mask().tolist()
    ([[5]], [[True, False, True]])
    """

    packed: jax.Array
    last: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, mask: jax.Array) -> Bits:
        return cls(formats.pack(mask.astype(jnp.uint8), 1), mask.shape[-1])

    def mask(self) -> jax.Array:
        """The bool array."""
        return formats.unpack(self.packed, 1, self.last, jnp.uint8).astype(bool)


def is_bits(x: Any) -> bool:
    return isinstance(x, Bits)


def opened(tree: Any) -> Any:
    """The pytree with a bool array for every `Bits`."""
    return jax.tree.map(lambda x: x.mask() if is_bits(x) else x, tree, is_leaf=is_bits)
