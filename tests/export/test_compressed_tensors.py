# SPDX-License-Identifier: Apache-2.0
"""The layout of compressed-tensors against what the package itself makes and reads."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from trees import assert_same
from twins import draw

import jaxcompress as jc
from jaxcompress._core.qtensor import Blocks, Tiles
from jaxcompress._files import safetensors
from jaxcompress.export import _ct_layout

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "compressed_tensors.npz")
CASES = sorted({name.split("/")[0] for name in GOLDEN})
LAYOUT = {"layout": "compressed-tensors"}


def tensors(case):
    """What the package makes, in the dtypes of the file."""
    found = {}
    for key in GOLDEN:
        if key.startswith(f"{case}/tensor/"):
            field, _, dtype = key.split("/")[2].partition(":")
            x = GOLDEN[key]
            found[field] = x.view(ml_dtypes.float8_e4m3fn) if dtype else x
    return found


def ours(case):
    """The same weight as a QTensor [in, out], put together from codes and scales."""
    config = json.loads(str(GOLDEN[f"{case}/config"]))
    args = config["config_groups"]["group_0"]["weights"]
    codes, scale = GOLDEN[f"{case}/codes"].T, GOLDEN[f"{case}/scale"].T
    bits, size = args["num_bits"], args.get("group_size")
    zero = GOLDEN[f"{case}/zero"].T if not args["symmetric"] else None
    kwargs = {}
    if args["type"] == "int":
        fmt = jc.formats.integer(bits, narrow=False)
    elif case in ("mxfp4", "mxfp8"):
        fmt = jc.formats.get("mxfp4" if bits == 4 else "mxfp8_e4m3")
        scale = (np.log2(scale) + 127).astype(np.uint8)
    elif case == "nvfp4":
        fmt = jc.formats.nvfp4
        scale, kwargs = scale.astype(fmt.scale_dtype), {"global_scale": jnp.float32(1 / 4)}
    else:
        fmt = jc.formats.float8_e4m3fn
    codes = np.ascontiguousarray(codes)
    if args["type"] == "float" and bits == 8:
        codes = codes.view(ml_dtypes.float8_e4m3fn)
    if size and size > 0:
        kwargs["blocks"] = Blocks((-2,), size)
        scale = scale[:, None]
        zero = None if zero is None else zero[:, None]
    elif args["strategy"] == "block":
        rows, columns = args["block_structure"]
        kwargs["blocks"] = Tiles(Blocks((-2,), columns), Blocks((-1,), rows))
        scale = scale[:, None, :, None]
    zero = None if zero is None else jnp.asarray(zero)
    return jc.QTensor.from_codes(
        jnp.asarray(codes), jnp.asarray(scale), zero, format=fmt, dtype="float32", **kwargs
    )


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_is_what_the_package_writes(case, tmp_path):
    np.testing.assert_array_equal(ours(case).dequantize().T, GOLDEN[f"{case}/weight"])
    jc.save_params({"a": {"b": {"kernel": ours(case)}}}, tmp_path / "m", **LAYOUT)
    want = tensors(case)
    header = safetensors.read_header(tmp_path / "m/model.safetensors")
    found = safetensors.read(header)
    assert found.keys() == {f"a.b.{field}" for field in want}
    for field, x in want.items():
        y = found[f"a.b.{field}"]
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), field
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    golden = json.loads(str(GOLDEN[f"{case}/config"]))
    group, other = (c["config_groups"]["group_0"] for c in (config, golden))
    assert config["format"] == group["format"] == golden["format"] == other["format"]
    assert group["targets"] == ["a.b"]
    for name, value in other["weights"].items():
        assert group["weights"][name] == value, name
    assert {"quant_method", "quantization_status", "ignore"} <= config.keys() & golden.keys()


@pytest.mark.parametrize("case", CASES)
def test_we_read_what_the_package_writes(case, tmp_path):
    write_foreign(tmp_path, {f"x.{f}": t for f, t in tensors(case).items()}, config(case))
    q = jc.load_params(tmp_path)["x"]["kernel"]
    want = ours(case)
    assert q.format == want.format and q.blocks == want.blocks
    if case in ("mxfp4", "nvfp4"):  # the package wrote -0 as 0
        want_codes = np.where(want.codes == 8, 0, want.codes)
    else:
        want_codes = want.codes
    np.testing.assert_array_equal(q.codes, want_codes)
    np.testing.assert_array_equal(q.dequantize().T, GOLDEN[f"{case}/weight"])
    dtype = jnp.bfloat16 if case in ("mxfp4", "mxfp8", "nvfp4") else jnp.float32
    assert q.dtype == dtype  # as the package decompresses


def config(case, **changes):
    return json.loads(str(GOLDEN[f"{case}/config"])) | changes


def write_foreign(folder, arrays, quantization, **config):
    """A model with no checksums and no notes of ours."""
    with open(folder / "sealed", "w+b") as file:
        safetensors.write(file, arrays, {})
    header = safetensors.read_header(folder / "sealed")
    body = (folder / "sealed").read_bytes()
    start = min((e.begin for e in header.entries.values()), default=len(body))
    entries = json.loads(body[8:start])
    del entries["__metadata__"]
    text = json.dumps(entries | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + body[start:]
    )
    (folder / "sealed").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


WORDS = {  # reference values of the packing, from the sources of the package
    4: ([-8, -7, 0, 7, 1, 2, 3, -1], [0x7BA9F810]),
    3: ([*range(-4, 4)] * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
}


@pytest.mark.parametrize("bits", WORDS)
def test_words(bits):
    codes, words = WORDS[bits]
    found = _ct_layout._words(np.array([codes], np.int8), bits)
    assert found.view(np.uint32).tolist() == [words]


def test_nibbles_of_fp4():
    scale = jnp.full((1, 1, 1), 127, jnp.uint8)
    codes = np.zeros((32, 1), np.uint8)
    codes[:4, 0] = [1, 10, 7, 3]  # 0.5, -1, 6, 1.5
    q = jc.QTensor.from_codes(
        jnp.asarray(codes), scale, format="mxfp4", dtype="float32", blocks=Blocks((-2,), 32)
    )
    assert _ct_layout.encode(q, "x")[1]["weight_packed"][0, :2].tolist() == [0xA1, 0x37]


@pytest.mark.parametrize(("bits", "columns"), [(3, 40), (5, 64), (6, 37), (7, 33), (3, 10)])
def test_packing_of_earlier_versions(bits, columns, tmp_path):
    """32 // bits to a word. Where both fill as many words, the version decides."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (2, columns))
    words = np.zeros((2, -(-columns // (32 // bits))), np.int64)
    for i in range(columns):
        at, place = divmod(i, 32 // bits)
        words[:, at] |= (codes[:, i] + 2 ** (bits - 1)) << place * bits
    arrays = {
        "x.weight_packed": words.astype(np.uint32).view(np.int32),
        "x.weight_scale": np.ones((2, 1), np.float32),
        "x.weight_shape": np.array([2, columns]),
    }
    changed = config("int3_ragged", version="0.17.1")
    changed["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    write_foreign(tmp_path, arrays, changed)
    np.testing.assert_array_equal(jc.load_params(tmp_path)["x"]["kernel"].codes.T, codes)


def model():
    w = draw(0, 64, 32)
    names = ("int4", "int8", "mxfp4", "float8_e4m3fn")
    layers = {str(i): {"kernel": jc.Quantizer(n).quantize(w, 0)} for i, n in enumerate(names)}
    embed = {"embedding": jnp.ones((7, 64), jnp.bfloat16)}
    return {"layers": layers, "norm": {"scale": jnp.ones(64)}, "embed": embed, "h": {"kernel": w}}


def test_a_mixed_model_and_its_shards(tmp_path):
    tree = model()
    jc.save_params(tree, tmp_path / "a", **LAYOUT)
    jc.save_params(tree, tmp_path / "b", **LAYOUT, max_shard_bytes=3000)
    assert len(list((tmp_path / "b").iterdir())) > 4
    with safe_open(tmp_path / "a/model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"
        np.testing.assert_array_equal(file.get_tensor("h.weight"), tree["h"]["kernel"].T)
        assert file.get_slice("embed.embedding").get_shape() == [7, 64]
    a, b = (jc.load_params(tmp_path / name) for name in "ab")
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for name in ("norm", "embed", "h"):
        assert_same(a[name], tree[name])
    for i, layer in tree["layers"].items():
        q = a["layers"][i]["kernel"]
        np.testing.assert_array_equal(q.dequantize(), layer["kernel"].dequantize())
    config = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    jc.save_params({"only": jnp.ones(2)}, tmp_path / "a", **LAYOUT)  # replaces it
    assert_same(jc.load_params(tmp_path / "a"), {"only": jnp.ones(2)})


def test_lists_and_leaves_that_are_not_called_kernel(tmp_path):
    q = jc.Quantizer("int8").quantize(jnp.eye(4), 0)
    jc.save_params(
        {"blocks": [{"up": q}, None], "k": jnp.ones((2, 3, 4))}, tmp_path / "m", **LAYOUT
    )
    found = jc.load_params(tmp_path / "m")
    np.testing.assert_array_equal(found["blocks"]["0"]["up"]["kernel"].codes, q.codes)
    assert found["k"].shape == (2, 3, 4)


def test_other_keys_of_the_configuration_may_change_and_this_one_not(tmp_path):
    jc.save_params(model(), tmp_path / "m", **LAYOUT)
    path = tmp_path / "m/config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "llama", "dtype": "float16", **data}))
    assert jc.load_params(tmp_path / "m")["layers"]["0"]["kernel"].dtype == jnp.float32
    data["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(jc.ArtifactError, match="is not the one that was saved"):
        jc.load_params(tmp_path / "m")


W = jnp.ones((32, 8))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": jc.Quantizer("nf4").quantize(W, 0)}, "`x` is nf4, for which compressed-tensors has"),
        ({"x": jc.Quantizer("mxfp6_e2m3").quantize(W, 0)}, "`x` is mxfp6_e2m3, for which"),
        ({"x": jc.Quantizer("mxfp8_e5m2").quantize(W, 0)}, "`x` is mxfp8_e5m2, for which"),
        (
            {"x": jc.Quantizer("int4", jc.per_block(8, 8)).quantize(W, 0)},
            "`x` is int4 in two-dimensional blocks",
        ),
        (
            {"x": {"kernel": jc.Quantizer("int8").quantize(W, 1)}},
            r"`x.kernel` \[32, 8\] has scales of the shape \[32, 1\]: compressed-tensors has them",
        ),
        (
            {"x": jc.Quantizer("int4", "group:24", indivisible="pad").quantize(W, 0)},
            r"has scales of the shape \[2, 1, 8\]",
        ),
        ({"x": jc.Quantizer("int8").quantize(jnp.ones((2, 4, 4)), 1)}, "stores matrices"),
        ({"a.b": jnp.ones(2)}, "The key 'a.b' below `` cannot be part of a name"),
        ({"x": 3}, "`x` cannot be stored as compressed-tensors: int"),
        ({"x": jnp.ones(2, jnp.int4)}, "`x` cannot be stored as compressed-tensors: .* int4"),
        ({"x": {"weight": W}}, "`x.weight` is a matrix called weight: call it kernel"),
        (
            {"x": {"kernel": jc.Quantizer("int8").quantize(W, 0), "weight_scale": W}},
            "Two leaves of the tree would be called `x.weight_scale`",
        ),
        (W, "give a dict of them"),
    ],
)
def test_what_it_has_no_place_for(tree, message, tmp_path):
    with pytest.raises(jc.ArtifactError, match=message):
        jc.save_params(tree, tmp_path / "m", **LAYOUT)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(jc.ArtifactError, match="is a directory, with config.json in it"):
        jc.save_params(tree, tmp_path / "m.safetensors", **LAYOUT)


def with_weights(case, **changes):
    data = config(case)
    data["config_groups"]["group_0"]["weights"] |= changes
    return data


@pytest.mark.parametrize(
    ("quantization", "drop", "message"),
    [
        (config("int4", quant_method="gptq"), None, "is of 'gptq', which is not read here"),
        (config("int4", transform_config={"a": 1}), None, "has a transform_config"),
        (config("int4", sparsity_config={"a": 1}), None, "has a sparsity_config"),
        (config("int4", quantization_status="frozen"), None, "weights are 'frozen'"),
        (config("int4", config_groups={}), None, "No group of the configuration is for `x`"),
        (config("int4", config_groups=[]), None, "is damaged: AttributeError"),
        (with_weights("int4", num_bits=5), None, "which does not go with 6 rows of 64 values"),
        (with_weights("int4", num_bits=2**70), None, "is damaged: ValueError: a scheme of"),
        (with_weights("int4", group_size=8), None, "does not go with its strategy 'group'"),
        (config("int4"), "x.weight_scale", r"holds other|no weight_scale|x"),
        (config("int4"), "x.weight_shape", "`x` has no weight_shape, which its format needs"),
        (with_weights("int4", symmetric=False), None, "`x` has no weight_zero_point"),
        (None, None, "has no quantization_config"),
    ],
)
def test_foreign_models_that_are_refused(quantization, drop, message, tmp_path):
    arrays = {f"x.{f}": t for f, t in tensors("int4").items() if f"x.{f}" != drop}
    write_foreign(tmp_path, arrays, quantization)
    if drop == "x.weight_scale":  # then it is no quantized module: its tensors are just arrays
        assert jc.load_params(tmp_path)["x"].keys() == {"weight_packed", "weight_shape"}
        return
    with pytest.raises(jc.ArtifactError, match=message):
        jc.load_params(tmp_path)


def test_groups_by_name_by_fit_and_ambiguous(tmp_path):
    four, eight = tensors("int4"), tensors("int8_channel")
    arrays = {f"m.a.{f}": t for f, t in four.items()} | {f"m.b.{f}": t for f, t in eight.items()}
    groups = {
        "group_0": config("int4")["config_groups"]["group_0"] | {"targets": ["re:.*(a+)+$"]},
        "group_1": config("int8_channel")["config_groups"]["group_0"],
    }
    both = config("int4", config_groups=groups, format="mixed-precision")
    write_foreign(tmp_path, arrays, both, torch_dtype="float16")
    found = jc.load_params(tmp_path)["m"]
    np.testing.assert_array_equal(found["a"]["kernel"].codes.T, GOLDEN["int4/codes"])
    np.testing.assert_array_equal(found["b"]["kernel"].codes.T, GOLDEN["int8_channel/codes"])
    assert found["a"]["kernel"].dtype == jnp.float16
    twin = groups["group_2"] = {**groups["group_1"], "format": "naive-quantized"}
    write_foreign(tmp_path, arrays, config("int4", config_groups=groups))
    with pytest.raises(jc.ArtifactError, match="Several groups of the configuration fit `m.b`"):
        jc.load_params(tmp_path)
    groups["group_2"] = {**twin, "targets": ["m.b"]}
    write_foreign(tmp_path, arrays, config("int4", config_groups=groups))
    assert jc.load_params(tmp_path)["m"]["b"]["kernel"].format.name == "int8_full"


@pytest.mark.parametrize(
    ("index", "good"),
    [(np.arange(64) // 16, True), (np.full(64, -1), True), (np.arange(64)[::-1] // 16, False)],
)
def test_orders_of_their_own(index, good, tmp_path):
    arrays = {f"x.{f}": t for f, t in tensors("int4").items()}
    arrays["x.weight_g_idx"] = index.astype(np.int32)
    write_foreign(tmp_path, arrays, config("int4"))
    if good:
        jc.load_params(tmp_path)
    else:
        with pytest.raises(jc.ArtifactError, match="actorder='group'"):
            jc.load_params(tmp_path)
