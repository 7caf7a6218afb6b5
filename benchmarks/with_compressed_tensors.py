# SPDX-License-Identifier: Apache-2.0
"""A Llama of two small layers, from us to compressed-tensors and back, by transformers itself.

For each scheme: `jc.save_params(layout="compressed-tensors")` of quantized weights, loaded with
`AutoModelForCausalLM.from_pretrained`, decompressed by the package, compared with our
`dequantize()`, weight by weight; and a model that the package compressed and saved, loaded with
`jc.load_params`, compared with what the package decompresses. Prints the largest relative
difference, how many weights differ at all, and how many after both were rounded to bfloat16: the
package decompresses NVFP4 in bfloat16.

Usage: pip install -e '.[bench]'; python benchmarks/with_compressed_tensors.py
"""

import importlib.metadata
import json
import sys
import tempfile
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import jaxcompress as jc

OURS = {
    "int4 group 32": jc.Quantizer("int4", "group:32"),
    "int4 group 32, zero points": jc.Quantizer("uint4", "group:32"),
    "int3 group 32": jc.Quantizer("int3", "group:32"),
    "int5 channel": jc.Quantizer("int5"),
    "int8 channel": jc.Quantizer("int8"),
    "fp8 channel": jc.Quantizer("float8_e4m3fn"),
    "fp8 block": jc.Quantizer("float8_e4m3fn", jc.per_block(32, 32)),
    "mxfp4": jc.Quantizer("mxfp4"),
    "mxfp8": jc.Quantizer("mxfp8_e4m3"),
    "nvfp4": jc.Quantizer("nvfp4"),
}
PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "FP8", "MXFP4A16", "NVFP4A16")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def tree_of(model, quantizer):
    """Our tree of a model: nested dicts, matrices of linear layers [in, out] and quantized."""
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    tree = {}
    for name, x in model.state_dict().items():
        *path, last = name.split(".")
        x = jnp.asarray(x.float().numpy())
        if last == "weight" and x.ndim == 2:
            last, x = "kernel", x.T
            if ".".join(path) in linear - {"lm_head"}:
                x = quantizer.quantize(x, axis=0)
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = x
    return tree


def leaf(tree, module):
    for part in module.split("."):
        tree = tree[part]
    return tree["kernel"]


def difference(pairs):
    largest = differing = rounded = total = 0
    for a, b in pairs:
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert a.shape == b.shape
        largest = max(largest, np.abs(a - b).max() / np.abs(b).max())
        differing, total = differing + (a != b).sum(), total + a.size
        rounded += (a.astype(ml_dtypes.bfloat16) != b.astype(ml_dtypes.bfloat16)).sum()
    return (
        f"largest relative difference {largest:.1e}; of {total} weights {differing} differ, "
        f"{rounded} in bfloat16"
    )


def from_us(quantizer, folder):
    model = llama()
    tree = tree_of(model, quantizer)
    jc.save_params(tree, folder, layout="compressed-tensors")
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(model.config.to_json_string()), **json.loads(path.read_text())})
    )
    jc.load_params(folder)  # the other keys of the configuration are not ours
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=CompressedTensorsConfig(run_compressed=False), dtype="float32"
    )
    weights = dict(loaded.named_parameters())
    names = [n for n, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)]
    pairs = []
    for name in names:
        q = leaf(tree, name)
        q = q.dequantize() if isinstance(q, jc.QTensor) else q
        pairs.append((weights[f"{name}.weight"].detach().float().numpy().T, q))
    logits = loaded(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
    return difference(pairs)


def from_the_package(preset, folder):
    model = llama()
    groups = {preset: ["Linear"]}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    apply_quantization_config(model, config)
    (group,) = config.config_groups.values()
    args = group.weights
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        w = module.weight.detach()
        size = args.group_size if args.group_size and args.group_size > 0 else w.shape[1]
        size = w.numel() if args.strategy == "tensor" else size
        absmax = w.reshape(-1, size).abs().amax(1)
        top = {8: 448.0 if args.type == "float" else 127.5, 4: 6.0 if args.type == "float" else 7.5}
        scale = absmax / top[args.num_bits]
        if preset.startswith("MX"):
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        if preset.startswith("NV"):
            divisor = 448 * 6 / w.abs().max()
            module.weight_global_scale.data.copy_(divisor)
            scale = (scale * divisor).to(torch.float8_e4m3fn).float()
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if not args.symmetric:
            module.weight_zero_point.data.random_(-3, 4)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    stored = {n: x.detach().clone() for n, x in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=stored)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    tree = jc.load_params(folder)
    pairs = []
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            q = leaf(tree, name)
            assert isinstance(q, jc.QTensor), name
            pairs.append((q.dequantize(), module.weight.detach().float().numpy().T))
    return difference(pairs)


def main():
    warnings.simplefilter("ignore")
    names = ("jax", "torch", "compressed-tensors", "transformers")
    print(", ".join(f"{n} {importlib.metadata.version(n)}" for n in names))
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, quantizer) in enumerate(OURS.items()):
            print(f"from us, {name:28}", from_us(quantizer, Path(folder, f"a{i}")), flush=True)
        for preset in PRESETS:
            path = Path(folder, f"b{preset}")
            print(f"from the package, {preset:19}", from_the_package(preset, path), flush=True)


if __name__ == "__main__":
    main()
