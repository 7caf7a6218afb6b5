# SPDX-License-Identifier: Apache-2.0
"""How important the indices of a coupled group are, for `jaxcompress.prune.shrink`."""

from ._activations import activation as activation
from ._activations import wanda as wanda
from ._base import Importance as Importance
from ._base import get as get
from ._depth import cosine as cosine
from ._fpgm import fpgm as fpgm
from ._gamma import gamma as gamma
from ._norms import l1 as l1
from ._norms import l2 as l2
from ._obs import obs as obs
from ._random import random as random
from ._taylor import taylor as taylor
