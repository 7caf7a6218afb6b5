# SPDX-License-Identifier: Apache-2.0
"""Pruning: weights that are exactly zero, by any published criterion, in any pytree."""

from ._axes import contracted_axes as contracted_axes
from ._chain import chain as chain
from ._distributions import erk as erk
from ._distributions import uniform as uniform
from ._fixed import fixed as fixed
from ._groups import Groups as Groups
from ._groups import groups as groups
from ._l0 import l0 as l0
from ._link import PruneState as PruneState
from ._link import masks as masks
from ._magnitude import magnitude as magnitude
from ._masked import masked as masked
from ._masks import apply_masks as apply_masks
from ._masks import sparsity as sparsity
from ._movement import movement as movement
from ._nm import nm as nm
from ._random import random as random
from ._report import Sparsities as Sparsities
from ._report import report as report
from ._rigl import rigl as rigl
from ._saliency import grasp as grasp
from ._saliency import snip as snip
from ._saliency import synflow as synflow
from ._schedules import constant as constant
from ._schedules import cubic as cubic
from ._schedules import one_shot as one_shot
from ._set import set as set
from ._soft import SoftParams as SoftParams
from ._soft import SoftPruned as SoftPruned
from ._sparse import sparse as sparse
from ._ste import sr_ste as sr_ste
from ._ste import ste as ste
from ._structures import blocks as blocks
from ._structures import channels as channels
from ._structures import unstructured as unstructured
