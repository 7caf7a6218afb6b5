# SPDX-License-Identifier: Apache-2.0
"""Number formats: which numbers exist, and how their codes are packed into bytes."""

from ._base import Format as Format
from ._bfloat16 import BFloat16 as BFloat16
from ._bfloat16 import bfloat16 as bfloat16
from ._block import BlockFormat as BlockFormat
from ._codebook import Codebook as Codebook
from ._codebook import codebook as codebook
from ._codebook import codebook_from_data as codebook_from_data
from ._codebook import nf4 as nf4
from ._e8m0 import E8M0 as E8M0
from ._e8m0 import float8_e8m0fnu as float8_e8m0fnu
from ._fixed import FixedPoint as FixedPoint
from ._fixed import fixed_point as fixed_point
from ._integer import Integer as Integer
from ._integer import integer as integer
from ._minifloat import Minifloat as Minifloat
from ._minifloat import float4_e2m1fn as float4_e2m1fn
from ._minifloat import float6_e2m3fn as float6_e2m3fn
from ._minifloat import float6_e3m2fn as float6_e3m2fn
from ._minifloat import float8_e3m4 as float8_e3m4
from ._minifloat import float8_e4m3 as float8_e4m3
from ._minifloat import float8_e4m3b11fnuz as float8_e4m3b11fnuz
from ._minifloat import float8_e4m3fn as float8_e4m3fn
from ._minifloat import float8_e4m3fnuz as float8_e4m3fnuz
from ._minifloat import float8_e5m2 as float8_e5m2
from ._minifloat import float8_e5m2fnuz as float8_e5m2fnuz
from ._minifloat import float16 as float16
from ._minifloat import minifloat as minifloat
from ._minifloat import p3109_draft as p3109_draft
from ._mx import MX as MX
from ._mx import block_float as block_float
from ._mx import mx as mx
from ._mx import mxfp4 as mxfp4
from ._mx import mxfp6_e2m3 as mxfp6_e2m3
from ._mx import mxfp6_e3m2 as mxfp6_e3m2
from ._mx import mxfp8_e4m3 as mxfp8_e4m3
from ._mx import mxfp8_e5m2 as mxfp8_e5m2
from ._mx import mxint8 as mxint8
from ._nvfp4 import NVFP4 as NVFP4
from ._nvfp4 import nvfp4 as nvfp4
from ._nvfp4 import nvfp4_four_over_six as nvfp4_four_over_six
from ._pack import pack as pack
from ._pack import packed_nbytes as packed_nbytes
from ._pack import unpack as unpack
from ._table import MAKERS as MAKERS
from ._table import TABLE as TABLE
from ._table import get as get
from ._table import to_data as to_data
from ._ternary import Binary as Binary
from ._ternary import Ternary as Ternary
from ._ternary import binary as binary
from ._ternary import ternary as ternary
from ._ternary import ternary_base3 as ternary_base3

int1, int2, int3, int4, int5, int6, int7, int8 = (integer(bits) for bits in range(1, 9))
uint1, uint2, uint3, uint4, uint5, uint6, uint7, uint8 = (
    integer(b, signed=False) for b in range(1, 9)
)
