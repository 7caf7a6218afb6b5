# SPDX-License-Identifier: Apache-2.0
"""Artifacts: written, read in another process, run, compared with the function that they hold."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from twins import RECIPES, default, normal

import jaxcompress as jc


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"] + p["bias"][None]


def conv(p, x):
    x = lax.conv_general_dilated(
        x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(x).mean((1, 2)) @ p["head"]


def transformer(p, ids):
    """Embedding, scanned blocks of attention and a gated MLP, tied head."""
    x = p["embed"][ids]

    def block(x, layer):
        h = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * layer["norm"][None, None]
        q, k, v = jnp.split(h @ layer["qkv"], 3, -1)
        heads = [a.reshape(*a.shape[:2], 2, -1) for a in (q, k, v)]
        x = x + jax.nn.dot_product_attention(*heads).reshape(x.shape) @ layer["out"]
        return x + jax.nn.gelu(x @ layer["up"]) @ layer["down"], None

    x, _ = lax.scan(block, x, p["layers"])
    return x @ p["embed"].T


def gru(p, x):
    def cell(h, x):
        z, r = jnp.split(jax.nn.sigmoid(x @ p["xg"] + h @ p["hg"]), 2, -1)
        new = jnp.tanh(x @ p["xh"] + (r * h) @ p["hh"])
        return z * h + (1 - z) * new, None

    h, _ = lax.scan(cell, jnp.zeros((x.shape[0], 32)), x.swapaxes(0, 1))
    return h @ p["head"]


D = 32
MODELS = {
    "mlp": (
        mlp,
        {"up": normal(D, 64, seed=1), "down": normal(64, D, seed=2), "bias": normal(D, seed=3)},
        normal(4, D, seed=4),
    ),
    "conv": (
        conv,
        {"conv": normal(3, 3, 4, D, seed=1), "head": normal(D, 10, seed=2)},
        normal(4, 8, 8, 4, seed=3),
    ),
    "transformer": (
        transformer,
        {
            "embed": normal(50, D, seed=1),
            "layers": {
                "norm": jnp.ones((2, D)),
                "qkv": normal(2, D, 3 * D, seed=2) / 6,
                "out": normal(2, D, D, seed=3) / 6,
                "up": normal(2, D, 2 * D, seed=4) / 6,
                "down": normal(2, 2 * D, D, seed=5) / 6,
            },
        },
        jax.random.randint(jax.random.key(6), (2, 6), 0, 50),
    ),
    "gru": (
        gru,
        {
            "xg": normal(8, 2 * D, seed=1),
            "hg": normal(D, 2 * D, seed=2) / 6,
            "xh": normal(8, D, seed=3),
            "hh": normal(D, D, seed=4) / 6,
            "head": normal(D, 10, seed=5),
        },
        normal(3, 5, 8, seed=6),
    ),
}


FEW = list(zip(RECIPES, [*MODELS] * 5))[::3]
ALL = [(r, m) for r in jc.recipes.RECIPES for m in MODELS]
LOADER = """
import sys, pathlib, numpy as np, jaxcompress as jc
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    artifact = jc.export.load(folder)
    assert jc.export.verify(artifact), jc.export.verify(artifact)
    data = folder.parent.parent / folder.name
    np.save(f"{data}.y.npy", artifact.run(np.load(f"{data}.x.npy")))
"""


def quantized(recipe, model):
    """(function, what it takes as parameters, input)."""
    fn, params, x = MODELS[model]
    rules = jc.recipes.get(recipe).rules
    if any(q is not None and q.special for r in rules for q in (r.weight, r.activation)):
        params = jc.quant_params(fn, recipe)(params, x)
    return jc.quantize_aware(fn, recipe), params, x


def in_a_fresh_process(code, *args):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "cases",
    [pytest.param(FEW, marks=pytest.mark.slow), pytest.param(ALL, marks=pytest.mark.full)],
)
def test_every_recipe_gives_the_same_bits_in_a_fresh_process(cases, tmp_path):
    """One call for four platforms; outputs and sites as the function has them under jit."""
    folder = tmp_path / "artifacts"
    for recipe, model in cases:
        fn, params, x = quantized(recipe, model)
        artifact = jc.export.stablehlo(fn, params, x, path=folder / f"{recipe} {model}")
        assert artifact.platforms == ("cpu", "cuda", "rocm", "tpu")
        left = {r.site.split("/")[-1] for r in artifact.report.rows if r.weight == "float32"}
        assert left <= {"norm", "bias", "step", "low", "high", "count", "weight"}, (recipe, model)
        np.save(tmp_path / f"{recipe} {model}.x.npy", x[::-1])
    in_a_fresh_process(LOADER, folder)
    for recipe, model in cases:
        fn, params, x = quantized(recipe, model)
        got = np.load(tmp_path / f"{recipe} {model}.y.npy")
        np.testing.assert_array_equal(got, jax.jit(fn)(params, x[::-1]), f"{recipe} {model}")


@pytest.mark.parametrize("name", MODELS)
def test_a_float_function_gives_the_same_bits(name, tmp_path):
    fn, params, x = MODELS[name]
    artifact = jc.export.stablehlo(fn, params, x, path=tmp_path / "a")
    found = jc.export.verify(jc.export.load(tmp_path / "a"), fn, params, [x, x[::-1]])
    assert found.equal, str(found)
    assert [r.name for r in found.rows if r.kind == "site"] == [
        s.name for s in jc.sites(fn)(params, x)
    ]
    np.testing.assert_array_equal(artifact.run(x), jax.jit(fn)(params, x))


# ---------------------------------------------------------------------- structure of inputs


def test_any_structure_of_inputs_and_outputs(tmp_path):
    def fn(p, batch, scale, *, flag=True):
        y = batch["x"][0] @ p["w"] * scale
        return {"y": y, "pair": (y + 1, [batch["ids"]]), "none": None}

    x = {"x": [normal(2, 4)], "ids": jnp.arange(3)}
    artifact = jc.export.stablehlo(fn, {"w": normal(4, 3)}, x, 2.0, path=tmp_path / "a")
    want = jax.jit(fn)({"w": normal(4, 3)}, x, 2.0)
    got = artifact.run(x, 2.0)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(
        artifact.run(x, 3.0)["y"], jax.jit(fn)({"w": normal(4, 3)}, x, 3.0)["y"]
    )


def test_settings_are_part_of_the_program(tmp_path):
    def fn(p, x, act, train):
        return {"relu": jax.nn.relu, "tanh": jnp.tanh}[act](x @ p["w"]) * (2 if train else 1)

    params, x = {"w": normal(4, 3), "depth": 3}, normal(2, 4)
    artifact = jc.export.stablehlo(fn, params, x, "relu", False, path=tmp_path / "a")
    np.testing.assert_array_equal(artifact.run(x, "relu", False), jax.nn.relu(x @ params["w"]))
    with pytest.raises(jc.ArtifactError, match="settings have to be those of the export"):
        artifact.run(x, "tanh", False)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((normal(4, 33),), r"Input `0` is float32\[4, 33\], the program takes float32\[4, 32\]"),
        ((normal(5, 32),), "with symbolic_batch=True for every size of batch"),
        ((jnp.ones((4, 32), jnp.int32),), r"is int32\[4, 32\]"),
        ((normal(4, 32), 1), "The program takes .*float32.*, and was given"),
        ((), "and was given"),
    ],
)
def test_other_inputs(inputs, message, tmp_path):
    fn, params, x = MODELS["mlp"]
    artifact = jc.export.stablehlo(fn, params, x, path=tmp_path / "a", platforms=["cpu"])
    with pytest.raises(jc.ArtifactError, match=message):
        artifact.run(*inputs)


def test_symbolic_batch(tmp_path):
    for recipe in ("w8a8", "w4a16-g32"):
        fn, params, x = quantized(recipe, "mlp")
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
        artifact = jc.export.stablehlo(fn, params, spec, path=tmp_path / "a", symbolic_batch=True)
        for n in (1, 3, 7):
            x = normal(n, D, seed=n)
            np.testing.assert_array_equal(artifact.run(x), jax.jit(fn)(params, x))
        found = jc.export.verify(artifact, fn, params, [normal(n, D) for n in (2, 5)])
        assert found.equal and {r.values for r in found.rows if r.kind == "output"} == {7 * D}
    with pytest.raises(jc.ArtifactError, match=r"`0` is float32\[2, 31\].*float32\[batch, 32\]"):
        artifact.run(normal(2, 31))
    with pytest.raises(jc.ArtifactError, match="holds no example inputs"):
        jc.export.verify(artifact)
    two = lambda p, x, y: x @ p["up"] + y.sum()  # noqa: E731
    with pytest.raises(jc.ArtifactError, match=r"leading sizes of the inputs are \['3', '4'\]"):
        jc.export.stablehlo(
            two, params, normal(4, D), normal(3), path=tmp_path / "b", symbolic_batch=True
        )


# ---------------------------------------------------------------------- verify


def test_verify_names_the_first_difference(tmp_path):
    fn, params, x = MODELS["mlp"]
    artifact = jc.export.stablehlo(fn, params, x, path=tmp_path / "a")
    other = params | {"down": params["down"].at[0, 0].add(1e-3)}
    found = jc.export.verify(artifact, fn, other, [x])
    assert not found and found.first_difference.name == "down"
    by_hand = np.tanh(x @ params["up"]) @ params["down"], np.tanh(x @ params["up"]) @ other["down"]
    gap = np.abs(by_hand[0] - by_hand[1]).max()
    row = next(r for r in found.rows if r.kind == "output")
    assert row.different == 4 and abs(row.largest - gap) < 1e-6
    assert "index (0, 0)" in row.first and "at site down" in str(found)
    assert json.loads(found.to_json())["equal"] is False
    nan = params | {"bias": params["bias"].at[3].set(jnp.nan)}
    row = jc.export.verify(artifact, fn, nan, [x]).first_difference
    assert (row.kind, row.different, row.largest) == ("output", 4, np.inf)
    same = jc.export.stablehlo(fn, nan, x, path=tmp_path / "b")
    assert jc.export.verify(same, fn, nan, [x]) and jc.export.verify(same)
    with pytest.raises(jc.ArtifactError, match="only one of them has `up`"):
        jc.export.verify(artifact, lambda p, x: jnp.tanh(x) @ p["down"][:D], params, [x])
    with pytest.raises(jc.ArtifactError, match="verify got no batches"):
        jc.export.verify(artifact, fn, params, [])


# ---------------------------------------------------------------------- trust and errors


def exported(tmp_path):
    fn, params, x = MODELS["mlp"]
    return jc.export.stablehlo(fn, params, x, path=tmp_path / "a", platforms=("cpu",)), x


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "program.bin", "sites.bin", "model.safetensors", "reference.safetensors"],
)
def test_every_file_is_checked(name, tmp_path):
    artifact, x = exported(tmp_path)
    path = tmp_path / "a" / name
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(jc.ArtifactError, match=name.replace(".", r"\.")):
            jc.export.load(tmp_path / "a")
    path.unlink()
    with pytest.raises(jc.ArtifactError):
        jc.export.load(tmp_path / "a")
    path.write_bytes(whole)
    assert jc.export.verify(jc.export.load(tmp_path / "a"))


def test_a_file_of_another_artifact_or_elsewhere(tmp_path):
    artifact, x = exported(tmp_path)
    fn, params, _ = MODELS["mlp"]
    jc.export.stablehlo(fn, jax.tree.map(lambda a: 2 * a, params), x, path=tmp_path / "b")
    model = tmp_path / "a" / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(jc.ArtifactError, match="does not have the checksum"):
        jc.export.load(tmp_path / "a")
    model.unlink()
    (tmp_path / "model.safetensors").write_bytes(whole)
    model.symlink_to(tmp_path / "model.safetensors")
    with pytest.raises(jc.ArtifactError, match="is a link to somewhere else"):
        jc.export.load(tmp_path / "a")


def test_what_cannot_be_exported(tmp_path):
    fn, params, x = MODELS["mlp"]
    for platforms in ("cpu", ["gpu"], []):
        with pytest.raises(jc.ArtifactError, match="expected some of cpu, cuda, rocm, tpu"):
            jc.export.stablehlo(fn, params, x, path=tmp_path / "a", platforms=platforms)
    with pytest.raises(TypeError, match="dot_general requires contracting"):  # the function's own
        jc.export.stablehlo(fn, params, x[:, :3], path=tmp_path / "a")
    with pytest.raises(jc.ArtifactError, match="cannot export this function for cpu.*int2"):
        jc.export.stablehlo(lambda p, x: x + p.astype(x.dtype), jnp.ones((4, 32), jnp.int2), x,
                            path=tmp_path / "a", platforms=["cpu"])  # fmt: skip
    callback = lambda p, x: jax.pure_callback(np.sin, x, x)  # noqa: E731
    with pytest.raises(jc.ArtifactError, match="cannot export this function"):
        jc.export.stablehlo(callback, params, x, path=tmp_path / "a", platforms=["cpu"])
    assert not (tmp_path / "a").exists()


def test_only_an_earlier_artifact_is_replaced(tmp_path):
    artifact, x = exported(tmp_path)
    exported(tmp_path)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(jc.ArtifactError, match="it holds .* Nothing was changed"):
        exported(tmp_path)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(jc.ArtifactError, match="is no earlier artifact"):
        jc.export.stablehlo(*MODELS["mlp"], path=tmp_path / "file")


def test_a_platform_that_is_not_there(tmp_path):
    fn, params, x = MODELS["mlp"]
    artifact = jc.export.stablehlo(fn, params, x, path=tmp_path / "a", platforms=["tpu"])
    with pytest.raises(
        jc.ArtifactError, match="was exported for tpu, and this process runs on cpu"
    ):
        artifact.run(x)


@pytest.mark.parametrize("recipe", default(["w8a8", "w8a8-static", "w4a16-g32"], "w8a8-static"))
def test_what_quantize_returns(recipe, tmp_path):
    """Packed parameters, with stored ranges too, are exported as they are."""

    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    params = {"up": normal(32, 64, seed=1), "down": normal(64, 8, seed=2)}
    x = normal(4, 32, seed=3)
    small = jc.quantize(fn, params, recipe, calibration=[x, 2 * x])
    artifact = jc.export.stablehlo(small.fn, small.params, x, path=tmp_path / "a")
    np.testing.assert_array_equal(artifact.run(x), jax.jit(small.fn)(small.params, x))
    assert jc.export.verify(artifact, small.fn, small.params, [x, -x]).equal
    formats = {row.site.split("/")[-1]: row.weight for row in artifact.report.rows}
    assert formats["up"] == formats["down"] == {"w8": "int8", "w4": "int4"}[recipe[:2]]
