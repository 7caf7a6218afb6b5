# SPDX-License-Identifier: Apache-2.0
"""Which indices of which arrays belong together, and what may be scaled, read off the jaxpr."""

from .find_pairs import scale_pairs as scale_pairs
from .folded import FoldedNorm as FoldedNorm
from .graph import channel_graph as channel_graph
from .groups import Group as Group
from .groups import GroupMember as GroupMember
from .groups import coupled_groups as coupled_groups
from .norms import fold_norm as fold_norm
from .pairs import Member as Member
from .pairs import ScalePair as ScalePair
from .pairs import ScalePairs as ScalePairs
from .pairs import Use as Use
