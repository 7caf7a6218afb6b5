# SPDX-License-Identifier: Apache-2.0
"""Makes compressed_tensors.npz with the package of that name (0.20.0, torch 2.13.0).

For each case: codes, scales and zero points that we chose, the configuration as the package writes
it, the tensors that its compressor makes, and the weight that its decompressor makes of those.

Usage: pip install compressed-tensors torch; python tests/golden/make_compressed_tensors.py
"""

import json
import pathlib

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
GROUP = {"strategy": "group", "group_size": 16}
CASES = {  # format, arguments, shape
    **{f"int{b}": ("pack-quantized", {"num_bits": b, **GROUP}, (6, 64)) for b in range(1, 9)},
    "int3_ragged": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}, (5, 37)),
    "int4_zero": ("pack-quantized", {"num_bits": 4, "symmetric": False, **GROUP}, (10, 64)),
    "int5_zero": (
        "pack-quantized",
        {"num_bits": 5, "symmetric": False, "strategy": "channel"},
        (13, 33),
    ),
    "int8_channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, (6, 33)),
    "int8_tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}, (6, 33)),
    "int8_zero": (
        "int-quantized",
        {"num_bits": 8, "symmetric": False, "strategy": "channel"},
        (6, 33),
    ),
    "fp8_channel": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        (6, 32),
    ),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 16]},
        (8, 32),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        (6, 64),
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {
            **{"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
            "scale_dtype": torch.uint8,
        },
        (6, 64),
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        (6, 64),
    ),
}


def codes_of(rng, args, shape):
    """What is stored for each weight, and the number that it stands for before scaling."""
    bits = args.num_bits
    if args.type == "int":
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
        return codes, codes.astype(np.float32)
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    if bits == 4:
        values = np.array(FP4, np.float32)[codes & 7]
        return codes, np.where(codes & 8, -values, values)
    codes[(codes & 127) == 127] = 5  # NaN
    return codes, torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()


def main():
    rng, out = np.random.default_rng(0), {}
    for name, (kind, settings, shape) in CASES.items():
        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
        codes, values = codes_of(rng, args, shape)
        rows, columns = shape
        across = {"channel": 1, "tensor": 1}.get(args.strategy, 0)
        if args.strategy == "block":
            r, c = args.block_structure
            small, wide = (rows // r, columns // c), (r, c)
        else:
            groups = across or columns // args.group_size
            small, wide = (rows, groups), (1, columns // groups)
        if args.strategy == "tensor":
            small, wide = (1, 1), shape
        # Powers of two, so that quantizing gives back the codes that were chosen.
        scale = np.exp2(rng.integers(-6, 3, small)).astype(np.float32)
        zero = np.zeros(small, np.int8)
        if not args.symmetric:
            half = 2 ** (args.num_bits - 1)
            zero = rng.integers(-half, half, small).astype(np.int8)
        zeros, scales = (np.kron(a, np.ones(wide, a.dtype)) for a in (zero, scale))
        weight = (values - zeros) * scales
        state = {"weight": torch.from_numpy(weight)}
        flat = scale.reshape(1) if args.strategy == "tensor" else scale
        state["weight_scale"] = torch.from_numpy(flat)
        if not args.symmetric:
            state["weight_zero_point"] = torch.from_numpy(zero)
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = torch.tensor([4.0])
            state["weight"] = state["weight"] / 4
        compressor = BaseCompressor.get_value_from_registry(kind)
        packed = compressor.compress(dict(state), scheme)
        back = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
        np.testing.assert_array_equal(back, state["weight"].numpy())
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=kind,
            quantization_status=QuantizationStatus.COMPRESSED,
        )
        data = {"version": "0.20.0", **config.model_dump()}
        out[f"{name}/config"] = np.array(json.dumps(data, default=str))
        out[f"{name}/codes"], out[f"{name}/scale"] = codes, scale
        out[f"{name}/weight"] = back
        if not args.symmetric:
            out[f"{name}/zero"] = zero
        for field, tensor in packed.items():
            if tensor.dtype == torch.float8_e4m3fn:
                tensor, field = tensor.view(torch.uint8), f"{field}:float8_e4m3fn"
            out[f"{name}/tensor/{field}"] = tensor.detach().numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("compressed_tensors.npz"), **out)


if __name__ == "__main__":
    main()
