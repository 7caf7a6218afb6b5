# SPDX-License-Identifier: Apache-2.0
"""Where a product of integers is faster than one of floats: measured, by shape and platform."""

from __future__ import annotations

from typing import Any

from .._core.sites import Site


def pays(op: Any, site: Site) -> bool:
    return False
