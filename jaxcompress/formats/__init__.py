# SPDX-License-Identifier: Apache-2.0
"""Number formats: which numbers exist, and how their codes are packed into bytes."""

from ._base import Format as Format
from ._integer import Integer as Integer
from ._integer import integer as integer
from ._minifloat import Minifloat as Minifloat
from ._minifloat import float8_e4m3fn as float8_e4m3fn
from ._minifloat import float8_e5m2 as float8_e5m2
from ._pack import pack as pack
from ._pack import packed_nbytes as packed_nbytes
from ._pack import unpack as unpack
from ._table import TABLE as TABLE
from ._table import get as get

int2, int3, int4, int5, int6, int7, int8 = (integer(bits) for bits in range(2, 9))
uint2, uint3, uint4, uint5, uint6, uint7, uint8 = (integer(b, signed=False) for b in range(2, 9))
