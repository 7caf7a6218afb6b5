# SPDX-License-Identifier: Apache-2.0
"""Writing is all or nothing, paths stay inside, sizes are bounded, versions are checked."""

import io
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same

import jaxcompress as jc
from jaxcompress._files import safetensors, sealed

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ROOT = pathlib.Path(__file__).parents[2]
TREE = {"a": jnp.arange(100.0), "b": {"c": jnp.ones(50)}}
LARGE = {"a": np.zeros(300_000, np.float32), "b": np.ones(300_000, np.float32)}


@pytest.fixture(params=["file", "folder", "shards", "compressed-tensors"])
def save(request, tmp_path):
    """Saves in one of the ways that there are; `.path` is where."""
    where = tmp_path / ("out.safetensors" if request.param == "file" else "out")
    kwargs = {"max_shard_bytes": 250_000} if request.param == "shards" else {}
    if request.param == "compressed-tensors":
        kwargs["layout"] = request.param

    def run(tree, path=where):
        jc.save_params(tree, path, **kwargs)

    run.path = where
    return run


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_what_was_there(save, earlier, tmp_path):
    """In a process whose files may not grow beyond a size: writing fails as on a full disk."""
    resource = pytest.importorskip("resource")
    if earlier:
        save(TREE)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(jc.ArtifactError, match="cannot be written: File too large. Nothing"):
            save(LARGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == ({save.path.name} if earlier else set())


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failure_at_any_step_leaves_what_was_there(call, save, tmp_path, monkeypatch):
    save(TREE)
    before = contents(tmp_path)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(safetensors, "write", fail)
        elif call == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(os, "replace", fail)
            patch.setattr(pathlib.Path, "rename", fail)
        with pytest.raises(jc.ArtifactError, match="No space left on device. Nothing was changed"):
            save(LARGE)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_killed_process_leaves_an_artifact_or_none(tmp_path):
    """Killed at random moments of overwriting: what is there always loads."""
    code = """
import sys, numpy as np, jaxcompress as jc
jc.save_params({"x": np.zeros(500_000)}, sys.argv[1])
print("ready", flush=True)
while True:
    for i in range(2):
        jc.save_params({"x": np.full(500_000, float(i))}, sys.argv[1])
"""
    path = tmp_path / "m.safetensors"
    for wait in (0.0, 0.031, 0.077, 0.113):
        words = [sys.executable, "-c", code, str(path)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout.readline() == b"ready\n"
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()
        x = jc.load_params(path, lazy=True)["x"]
        assert np.all(x == x[0])
        jc.load_params(path)


# --- paths


def resealed(folder, change):
    """Changes the index of a sharded model and makes its checksum good again."""
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    del data["metadata"]["sha256"]
    change(data)
    metadata = data.pop("metadata")
    path.write_bytes(sealed.seal("metadata", metadata, data))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x", "..", ".", "", "a\\b", "C:x", "x\0y"]
)
def test_names_that_lead_out_of_the_directory(name, tmp_path):
    jc.save_params(TREE, tmp_path / "m", max_shard_bytes=300)
    (shard, *_) = sorted((tmp_path / "m").glob("model-*"))
    shutil.copy(shard, tmp_path / "outside.safetensors")
    (tmp_path / "m/sub").mkdir()
    shutil.copy(shard, tmp_path / "m/sub/x")

    def change(data):
        names = data["weight_map"].items()
        data["weight_map"] = {k: name if v == shard.name else v for k, v in names}
        about = json.loads(data["metadata"]["jaxcompress"])
        about["files"][name] = about["files"][shard.name]
        data["metadata"]["jaxcompress"] = json.dumps(about)

    resealed(tmp_path / "m", change)
    with pytest.raises(jc.ArtifactError, match="which is no plain name of a file"):
        jc.load_params(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_directory_are_not_followed(name, tmp_path):
    jc.save_params(TREE, tmp_path / "m", layout="compressed-tensors")
    (tmp_path / "m" / name).rename(tmp_path / "elsewhere")
    (tmp_path / "m" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(jc.ArtifactError, match="is a link to somewhere else, which is not"):
        jc.load_params(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "m")  # of the whole: that is for the user to say
    (tmp_path / "m" / name).unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "m" / name)
    jc.load_params(tmp_path / "link")


def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", "/dev/zero"):
        with pytest.raises(jc.ArtifactError, match="is not a regular file"):
            jc.load_params(path)


# --- sizes


def test_headers_that_promise_too_much(tmp_path):
    path = tmp_path / "m.safetensors"
    for length in (2**32, 2**63, 2**64 - 1, 100):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(jc.ArtifactError, match="its header has [0-9,]+ bytes, the file 10"):
            jc.load_params(path)
    with open(path, "wb") as file:  # a hole: much on paper, nothing on the disk
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)
    with pytest.raises(jc.ArtifactError, match="at most 33,554,432 are expected of a header"):
        jc.load_params(path)
    path.write_bytes(b"\x80\x04")  # of a pickle
    with pytest.raises(jc.ArtifactError, match="is no safetensors file: it has only 2 bytes"):
        jc.load_params(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply|recursion|damaged"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', "a key comes twice"),
        ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "NaN is no number of JSON"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "is not what F32"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "overlap or leave a gap"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "the entry of 'a' is wrong"),
        ('{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}', "of dtype 'Q9', which is not"),
        ('{"a":{"dtype":"F32","shape":[0,1e99],"data_offsets":[0,0]}}', "entry of 'a' is wrong"),
        ('{"a":{"dtype":"F32","shape":[0,9999999999999999999],"data_offsets":[0,0]}}', "shape"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "not written by jc.save_params"),
        ('{"__metadata__":{"x":1}}', "its metadata are not texts"),
        ("[]", "it holds no JSON object"),
        ("\xff", "is damaged: "),
    ],
)
def test_headers_that_lie(text, message, tmp_path):
    path = tmp_path / "m.safetensors"
    raw = text.encode("latin-1")
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    with pytest.raises(jc.ArtifactError, match=message):
        jc.load_params(path)


def test_a_description_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "LIMIT", 2000)
    with pytest.raises(jc.ArtifactError, match="bytes, at most 2,000 can be read again"):
        jc.save_params({str(i): i for i in range(500)}, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# --- checksums and versions


def test_checksums_come_before_parsing(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    jc.save_params(TREE, path)
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(jc.ArtifactError, match="its header does not have the checksum"):
        jc.load_params(path)


def test_shards_of_two_saves_do_not_mix(tmp_path):
    for name, add in (("a", 0), ("b", 1)):
        tree = {"a": TREE["a"] + add, "b": TREE["b"]}
        jc.save_params(tree, tmp_path / name, max_shard_bytes=400)
    name = "model-00001-of-00002.safetensors"
    shutil.copy(tmp_path / "a" / name, tmp_path / "b" / name)
    with pytest.raises(jc.ArtifactError, match=f"{name} is not the file that .* was written with"):
        jc.load_params(tmp_path / "b")
    (tmp_path / "b" / name).unlink()
    with pytest.raises(jc.ArtifactError, match=f"{name} cannot be read: No such file"):
        jc.load_params(tmp_path / "b")
    with pytest.raises(jc.ArtifactError, match="is a part of a model: load the directory"):
        jc.load_params(tmp_path / "a" / name)


def test_versions(tmp_path):
    for version in (0, 2, "1", None, 1.5, True):
        about = json.dumps({"schema_version": version, "layout": "jaxcompress", "tree": None})
        buffer = io.BytesIO()
        safetensors.write(buffer, {}, {"jaxcompress": about})
        (tmp_path / "m.safetensors").write_bytes(buffer.getvalue())
        message = f"has schema version {version!r}, this jaxcompress reads 1"
        with pytest.raises(jc.ArtifactError, match=message):
            jc.load_params(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kind", ["file.safetensors", "shards", "compressed-tensors"])
def test_artifacts_of_schema_version_1_still_load(kind):
    """Never made again; `values.npz` has what its QTensors stood for when they were written."""
    tree = jc.load_params(GOLDEN / "schema_1" / kind)
    with np.load(GOLDEN / "schema_1/values.npz") as values:
        for name in values:
            q = tree[name]["kernel"] if isinstance(tree[name], dict) else tree[name]
            np.testing.assert_array_equal(q.dequantize(), values[name], err_msg=name)
            error = np.abs(values[name] - np.cos(np.arange(512.0)).reshape(64, 8)).max()
            assert error < 0.251, name  # they all were this matrix; half a step of mxfp4 is 0.25
    if kind != "compressed-tensors":
        assert tree["nodes"][0] == (1, 2.5, "s", None)
        assert tree["int4"].format == jc.formats.int4
        assert_same(tree["nodes"][1], {"i": jnp.array([1, -8, 7], jnp.int4)})
