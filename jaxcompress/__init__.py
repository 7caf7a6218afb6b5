# SPDX-License-Identifier: Apache-2.0
"""Compression for any JAX function: a function goes in, a function comes out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import formats as formats
from ._calibration.stream import Inputs as Inputs
from ._core.compressed import Compressed as Compressed
from ._core.observe import sites as sites
from ._core.observe import tap as tap
from ._core.packed import with_qtensors as with_qtensors
from ._core.qtensor import QTensor as QTensor
from ._core.qtensor import nbytes as nbytes
from ._core.sites import Operand as Operand
from ._core.sites import Site as Site
from ._core.sparse import SparseTensor as SparseTensor
from ._errors import ArtifactError as ArtifactError
from ._errors import FormatError as FormatError
from ._errors import JaxCompressError as JaxCompressError
from ._errors import RecipeError as RecipeError
from ._errors import SiteError as SiteError
from ._quantize import methods as methods
from ._quantize import recipes as recipes
from ._quantize.aware import quantize_aware as quantize_aware
from ._quantize.calibrate import calibrate as calibrate
from ._quantize.granularity import Granularity as Granularity
from ._quantize.granularity import per_block as per_block
from ._quantize.granularity import per_group as per_group
from ._quantize.params import QuantParams as QuantParams
from ._quantize.params import quant_params as quant_params
from ._quantize.params import quant_tx as quant_tx
from ._quantize.post_training import quantize as quantize
from ._quantize.quantizer import Quantizer as Quantizer
from ._quantize.recipe import Recipe as Recipe
from ._quantize.recipe import Rule as Rule
from ._quantize.report import Report as Report
from ._quantize.report import report as report
from ._quantize.stateful import quantize_aware_with_state as quantize_aware_with_state
from ._task import Task as Task
from ._task import Train as Train

if TYPE_CHECKING:
    from . import distill as distill
    from . import export as export
    from . import prune as prune
    from .export import load_params as load_params
    from .export import save_params as save_params

__version__ = "0.1.0"

# Imported when they are used: a third of the time that importing everything takes.
_ROOMS = ("distill", "export", "prune")
_FROM_EXPORT = ("load_params", "save_params")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    if name in _FROM_EXPORT:
        return getattr(importlib.import_module(".export", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_FROM_EXPORT})
