# SPDX-License-Identifier: Apache-2.0
"""One QTensor as the tensors and settings of a module of compressed-tensors, and back.

A kernel [in, out] of ours is `weight` [out, in] there, so everything is transposed:

    pack-quantized         weight_packed int32[out, in b / 32]: codes + 2^(b-1), low bits first,
                           rows filled up; weight_scale[out, groups]; weight_shape;
                           weight_zero_point int32[out b / 32, groups], packed along out
    int-, float-quantized  weight int8 or float8_e4m3fn[out, in]; weight_scale[out, groups], [1] or
                           [out / r, in / c]; weight_zero_point
    mxfp4, nvfp4           weight_packed uint8[out, in / 2], low nibble first; weight_scale uint8
                           exponents or float8_e4m3fn[out, groups]; nvfp4: weight_global_scale[1],
                           which divides
    mxfp8-quantized        weight float8_e4m3fn; weight_scale uint8 exponents

References: compressed-tensors 0.20.0, `compressors/*/base.py` and `pack_quantized/helpers.py`.
Until 0.17.1 codes of 3, 5, 6 and 7 bits did not cross words: 32 // b to a word. Such are read too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import formats
from .._core.blocks import Blocks, Tiles
from .._core.qtensor import QTensor
from .._errors import ArtifactError
from .._files import bits as host_bits

TENSORS = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    *("weight_global_scale", "weight_g_idx"),
)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the weight of a module is stored. Names and values are those of compressed-tensors."""

    format: str
    num_bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    scale_dtype: str | None = None

    def weights(self) -> dict[str, Any]:
        """The entry `"weights"` of a group in the configuration."""
        args = dataclasses.asdict(self)
        del args["format"]
        return args | {"block_structure": self.block_structure and list(self.block_structure)}


def encode(q: QTensor, name: str) -> tuple[Scheme, dict[str, np.ndarray]]:
    """The scheme and the tensors of a QTensor [in, out]; `name` names it in errors.

    Raises:
      ArtifactError: compressed-tensors has no place for its shape, format or scales.
    """
    if q.ndim != 2:
        raise ArtifactError(
            f"`{name}` has the shape {q.shape}: compressed-tensors stores matrices. Give each "
            "layer and expert its own leaf, or use layout='jaxcompress'."
        )
    fmt, scale = q.format, np.asarray(q.scale)
    strategy, settings, scale = _scales_out(q, scale, name)
    codes = _codes(q.packed, fmt, q.shape[-1]) if q.axis == -1 else np.asarray(q.codes)
    out: dict[str, np.ndarray] = {}
    if isinstance(fmt, formats.Integer | formats.Ternary):
        bits = fmt.code_bits
        shift = 2 ** (bits - 1) if fmt.dtype == jnp.uint8 else 0
        zero = None
        if q.packed_zero_point is not None:
            zero = _codes(q.packed_zero_point, fmt, q.scale.shape[-1])
            zero = _scales_out(q, zero, name)[2].astype(np.int16)
        elif shift:
            zero = np.zeros(scale.shape, np.int16)
        codes = (codes.T.astype(np.int16) - shift).astype(np.int8)
        zero = None if zero is None else (zero - shift).astype(np.int8)
        if bits == 8 and strategy != "group":
            scheme = Scheme("int-quantized", 8, "int", zero is None, strategy, **settings)
            out["weight"] = codes
            if zero is not None:
                out["weight_zero_point"] = zero
        else:
            if strategy == "block":
                raise _unfit(name, f"{fmt.name} in two-dimensional blocks")
            if strategy == "tensor":
                strategy, scale = "channel", np.full((q.shape[-1], 1), scale[0])
                zero = None if zero is None else np.full((q.shape[-1], 1), zero[0])
            scheme = Scheme("pack-quantized", bits, "int", zero is None, strategy, **settings)
            out["weight_packed"] = _words(codes, bits)
            out["weight_shape"] = np.array(codes.shape, np.int64)
            if zero is not None:
                out["weight_zero_point"] = np.ascontiguousarray(_words(zero.T, bits).T)
        out["weight_scale"] = scale.astype(np.float32)
        return scheme, out
    element = getattr(fmt, "element", fmt)
    if fmt == formats.float8_e4m3fn:
        out["weight"], out["weight_scale"] = codes.T, scale.astype(np.float32)
        return Scheme("float-quantized", 8, "float", True, strategy, **settings), out
    if strategy != "group" or element not in (formats.float8_e4m3fn, formats.float4_e2m1fn):
        raise _unfit(name, fmt.name)
    out["weight_scale"] = scale
    if element == formats.float4_e2m1fn:
        codes = np.where(codes == 8, np.uint8(0), codes)  # its compressors write -0 as 0
    if isinstance(fmt, formats.NVFP4) and settings == {"group_size": 16}:
        top = np.float32(1 if q.global_scale is None else q.global_scale)
        out["weight_packed"] = host_bits.pack(codes.T, 4)
        out["weight_global_scale"] = (np.float32(1) / top).reshape(1)
        dtype = "torch.float8_e4m3fn"
        name = "nvfp4-pack-quantized"
        return Scheme(name, 4, "float", True, "tensor_group", 16, None, dtype), out
    if not isinstance(fmt, formats.MX) or settings != {"group_size": 32}:
        raise _unfit(name, f"{fmt.name} in groups of {settings['group_size']}")
    if element == formats.float4_e2m1fn:
        out["weight_packed"] = host_bits.pack(codes.T, 4)
        kind, bits = "mxfp4-pack-quantized", 4
    else:
        out["weight"] = codes.T
        kind, bits = "mxfp8-quantized", 8
    return Scheme(kind, bits, "float", True, "group", 32, None, "torch.uint8"), out


def decode(
    scheme: Scheme, tensors: Mapping[str, np.ndarray], name: str, dtype: Any, dense: bool
) -> QTensor:
    """The QTensor [in, out] of the tensors of a module.

    Args:
      scheme: how they are stored.
      tensors: by their names in `TENSORS`.
      name: of the module, for errors.
      dtype: of the array that the QTensor stands for; None for that of the scales.
      dense: whether codes cross words, where sizes do not tell.

    Raises:
      ArtifactError: tensors and scheme do not fit together.
    """
    scale = _get(tensors, "weight_scale", name)
    top = zero = None
    if scheme.format == "pack-quantized":
        shape = _get(tensors, "weight_shape", name)
        if shape.shape != (2,) or shape.dtype.kind != "i":
            raise _wrong(name, "weight_shape")
        rows, columns = map(int, shape)
        fmt = formats.integer(scheme.num_bits, narrow=False)
        packed = _get(tensors, "weight_packed", name)
        codes = _from_words(packed, scheme.num_bits, rows, columns, dense, name)
        if not scheme.symmetric:
            packed = _get(tensors, "weight_zero_point", name)
            if packed.ndim != 2:
                raise _wrong(name, "weight_zero_point")
            groups = packed.shape[1]
            zero = _from_words(packed.T, scheme.num_bits, groups, rows, dense, name).T
    elif scheme.format in ("int-quantized", "float-quantized", "naive-quantized"):
        codes = _get(tensors, "weight", name)
        fmt = formats.integer(8, narrow=False) if scheme.type == "int" else formats.float8_e4m3fn
        zero = None if scheme.symmetric else _get(tensors, "weight_zero_point", name)
    elif scheme.format == "mxfp8-quantized":
        codes, fmt = _get(tensors, "weight", name), formats.mxfp8_e4m3
    elif scheme.format in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        packed = _get(tensors, "weight_packed", name)
        if packed.dtype != np.uint8 or packed.ndim != 2:
            raise _wrong(name, "weight_packed")
        codes = host_bits.unpack(packed, 4, 2 * packed.shape[1])
        fmt = formats.mxfp4 if scheme.format.startswith("mx") else formats.nvfp4
        if fmt == formats.nvfp4:
            divisor = _get(tensors, "weight_global_scale", name)
            if divisor.size != 1 or divisor.dtype.kind != "f":
                raise _wrong(name, "weight_global_scale")
            with np.errstate(divide="ignore"):
                top = jnp.asarray(np.float32(1) / divisor.astype(np.float32).reshape(()))
    else:
        raise ArtifactError(f"`{name}` has the format {scheme.format!r}, which is not read here.")
    if codes.ndim != 2 or codes.dtype != fmt.dtype:
        raise _wrong(name, "weight")
    index = tensors.get("weight_g_idx")
    if index is not None and not _in_order(index, codes.shape[1], scheme.group_size):
        raise ArtifactError(
            f"`{name}` was quantized in an order of its own (actorder='group'), which QTensor "
            "does not have."
        )
    if fmt.scale_dtype == jnp.float32:
        if scale.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
            raise _wrong(name, "weight_scale")
        dtype, scale = dtype or scale.dtype, scale.astype(np.float32)
    elif scale.dtype.name == "float8_e8m0fnu" and fmt.scale_dtype == jnp.uint8:
        scale = scale.view(np.uint8)
    if scale.dtype != fmt.scale_dtype:
        raise _wrong(name, "weight_scale")
    scale, blocks = _scales_in(scheme, scale, codes.shape, name)
    if zero is not None:
        if zero.dtype != np.int8:
            raise _wrong(name, "weight_zero_point")
        zero = _scales_in(scheme, zero, codes.shape, name)[0]
        zero = jnp.asarray(_pack(zero, fmt))
    packed = jnp.asarray(_pack(np.ascontiguousarray(codes.T), fmt))
    dtype = jnp.dtype(dtype or jnp.bfloat16)
    scale = jnp.asarray(scale)
    room, taken = fmt.unit
    unused = packed.shape[-1] * room // taken - codes.shape[0]
    return QTensor(packed, scale, zero, fmt, dtype, unused, blocks, global_scale=top)


def _scales_out(q: QTensor, scale: np.ndarray, name: str) -> tuple[str, dict[str, Any], np.ndarray]:
    """Strategy, its settings, and the scales in the layout of compressed-tensors."""
    (rows, columns), blocks = q.shape, q.blocks
    if blocks is None and scale.shape == (1, columns):
        return "channel", {}, scale.T
    if blocks is None and scale.size == 1:
        return "tensor", {}, scale.reshape(1)
    if isinstance(blocks, Blocks) and blocks.axis == (-2,) and rows % blocks.size == 0:
        if scale.shape == (rows // blocks.size, 1, columns):
            return "group", {"group_size": blocks.size}, scale[:, 0].T
    if isinstance(blocks, Tiles) and blocks.columns.axis == (-2,) and blocks.rows.axis == (-1,):
        across, down = blocks.columns.size, blocks.rows.size
        if scale.shape == (-(-rows // across), 1, -(-columns // down), 1):
            settings = {"block_structure": (down, across)}
            return "block", settings, scale[:, 0, :, 0].T
    raise ArtifactError(
        f"`{name}` {list(q.shape)} has scales of the shape {list(scale.shape)}: compressed-tensors "
        "has them per tensor, per output (the last axis), and per group or block of inputs (the "
        "first axis) that divides them. Use layout='jaxcompress'."
    )


def _scales_in(
    scheme: Scheme, scale: np.ndarray, shape: tuple[int, ...], name: str
) -> tuple[np.ndarray, Blocks | Tiles | None]:
    """The scales in our layout, for codes [out, in] of that shape, and how they are cut."""
    out, columns = shape
    size = scheme.group_size
    if scheme.strategy == "tensor" and scale.size == 1:
        return scale.reshape(1, 1), None
    if scheme.strategy == "channel" and scale.shape in ((out, 1), (out,)):
        return np.ascontiguousarray(scale.reshape(1, out)), None
    if scheme.strategy in ("group", "tensor_group") and size:
        if columns == scale.shape[-1] * size and scale.shape[:-1] == (out,):
            return np.ascontiguousarray(scale.T[:, None]), Blocks((-2,), size)
    if scheme.strategy == "block" and scheme.block_structure:
        down, across = scheme.block_structure
        if scale.shape == (-(-out // down), -(-columns // across)):
            blocks = Tiles(Blocks((-2,), across), Blocks((-1,), down))
            return np.ascontiguousarray(scale.T[:, None, :, None]), blocks
    raise ArtifactError(
        f"`{name}` {list(shape)} has scales of the shape {list(scale.shape)}, which does not go "
        f"with its strategy {scheme.strategy!r} ({size or scheme.block_structure})."
    )


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8[r, c] -> int32[r, ceil(c bits / 32)]: offset by 2^(bits-1), low bits first."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    packed = host_bits.pack(unsigned, bits)
    packed = np.pad(packed, [(0, 0), (0, -packed.shape[1] % 4)])
    return np.ascontiguousarray(packed).view("<i4")


def _from_words(
    words: np.ndarray, bits: int, rows: int, columns: int, dense: bool, name: str
) -> np.ndarray:
    """The inverse of `_words`, and of the packing before 0.18."""
    per_word = 32 // bits
    widths = (-(-columns * bits // 32), -(-columns // per_word))
    if words.dtype != np.int32 or words.ndim != 2 or min(rows, columns) < 0:
        raise _wrong(name, "weight_packed")
    if words.shape[0] != rows or words.shape[1] not in widths:
        raise ArtifactError(
            f"`{name}` has packed words of the shape {list(words.shape)}, which does not go with "
            f"{rows} rows of {columns} values of {bits} bits."
        )
    words = np.ascontiguousarray(words)
    if 32 % bits and words.shape[1] == widths[1] and (widths[0] != widths[1] or not dense):
        starts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
        fields = words.view(np.uint32)[..., None] >> starts & np.uint32(2**bits - 1)
        codes = fields.reshape(rows, -1)[:, :columns].astype(np.int16)
    else:
        codes = host_bits.unpack(words.view(np.uint8), bits, columns).astype(np.int16)
    return (codes - 2 ** (bits - 1)).astype(np.int8)


def _codes(packed: Any, fmt: formats.Format, last: int) -> np.ndarray:
    """The codes of packed ones, in the dtype of the format."""
    packed = np.asarray(packed)
    if fmt.code_bits >= 8:
        return packed
    codes = np.ascontiguousarray(host_bits.unpack(packed, fmt.code_bits, last))
    return host_bits.signed(codes, fmt.code_bits) if fmt.dtype == jnp.int8 else codes


def _pack(codes: np.ndarray, fmt: formats.Format) -> np.ndarray:
    return codes if fmt.code_bits >= 8 else host_bits.pack(codes, fmt.code_bits)


def _in_order(index: np.ndarray, columns: int, size: int | None) -> bool:
    if index.shape != (columns,):
        return False
    return bool((index == -1).all() or size and (index == np.arange(columns) // size).all())


def _get(tensors: Mapping[str, np.ndarray], field: str, name: str) -> np.ndarray:
    if field not in tensors:
        raise ArtifactError(f"`{name}` has no {field}, which its format needs.")
    return tensors[field]


def _wrong(name: str, field: str) -> ArtifactError:
    return ArtifactError(f"`{name}.{field}` does not have the dtype or shape of its format.")


def _unfit(name: str, what: str) -> ArtifactError:
    return ArtifactError(
        f"`{name}` is {what}, for which compressed-tensors has no layout. It has integers per "
        "channel and group, int8 and float8_e4m3fn also per tensor and block, mxfp8_e4m3, mxfp4 "
        "and nvfp4 along the inputs. Use layout='jaxcompress'."
    )
