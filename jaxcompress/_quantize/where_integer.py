# SPDX-License-Identifier: Apache-2.0
"""Where a product of integers is faster than one of floats: measured, by shape and platform.

Only CPUs are measured. Forward pass with both quantizations, over float fake quantization, one
pinned core of an AVX512 server with VNNI, CPU time, interleaved medians; jax 0.12 / 0.10:

    dot, rows x terms x columns
    2048 x 256 x 1024      0.43 / 0.70        256 x 64 x 64       0.77 / 0.83
    2048 x 1024 x 256      0.36 / 0.68        64 x 128 x 128      0.68 / 0.91
    1024 x 384 x 384       0.34 / 0.73        32 x 256 x 256      0.70 / 0.92
    256 x 1024 x 1024      0.39 / 0.69        256 x 1024 x 10     0.81 / 0.85
    256 x 784 x 1024       0.38 / 0.70        256 x 32 x 32       0.96 / 1.00
                                              16 x 32 x 32        1.03 / 0.92
                                              8 x 64 x 64         1.04 / 0.97

    3 x 3 convolution, channels in -> out, over float32 (reference/performance of the formulation)
    3 -> 16  3.5    16 -> 16  7.9    32 -> 32  0.60    64 -> 64  0.41

Without VNNI (AVX2 alone) the bare products are 0.63 to 0.87 of float32 and still win where they do
above: 0.85 against 0.94 (MLP), 0.78 against 0.85 (transformer) for the step; convolutions with both
quantizations 0.88 (32 channels) and 0.83 to 0.88 (64) of float32.

Slow at any size, and therefore left in floats: batched dots, sums over the first axis of the left
operand, grouped convolutions, dilated inputs, zero points of convolutions.
"""

from __future__ import annotations

import math

import jax

from .._core.sites import Site
from . import flat
from .integer_dot import Dot, Operation

_DOT = (32, 32, 8)  # rows, terms, columns
_WORK = 2**17  # multiplications of a dot: less is not worth two conversions
_CONV = (16, 32)  # channels in, channels out


def pays(op: Operation, site: Site, affine: bool, platform: str | None = None) -> bool:
    """Whether the product of a site is faster in integers.

    Args:
      op: the product.
      site: its shapes.
      affine: whether an operand has a zero point that stays.
      platform: where it is to run; by default JAX's backend. All but "cpu" are not measured.
    """
    if isinstance(op, Dot):
        return lay_out(op, site, platform)
    if (platform or jax.default_backend()) != "cpu":
        return False
    rhs, params = site.operands[1].shape, dict(op.params)
    if params["feature_group_count"] != 1 or math.prod(params["lhs_dilation"]) != 1 or affine:
        return False
    spec = params["dimension_numbers"].rhs_spec
    return rhs[spec[1]] >= _CONV[0] and rhs[spec[0]] >= _CONV[1]


def lay_out(op: Operation, site: Site, platform: str | None = None) -> bool:
    """Whether a product is faster as one of matrices: where it is worth integers, too."""
    if (platform or jax.default_backend()) != "cpu" or not isinstance(op, Dot):
        return False
    found = flat.sides(op.numbers, *(o.shape for o in site.operands))
    if found is None or found[0].summed != 1:
        return False
    (rows, terms), columns = found[0].shape, found[1].shape[1 - found[1].summed]
    if not all(isinstance(n, int) for n in (rows, terms, columns)):
        return False  # exported for sizes that are not known yet
    enough = all(n >= least for n, least in zip((rows, terms, columns), _DOT, strict=True))
    return enough and rows * terms * columns >= _WORK
