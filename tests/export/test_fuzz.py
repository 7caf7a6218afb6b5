# SPDX-License-Identifier: Apache-2.0
"""Files that were damaged, or made to harm: a clear error or an equal result, and nothing else.

Bytes are mutated at random (cut, flipped, replaced, moved), and JSON is mutated as an attacker
would, with every checksum made good again. A mutation must not raise anything but `ArtifactError`,
take long, take a gigabyte of memory (the address space is limited while it runs), or write files.
`-m full` takes 10,000 mutations of each kind of file.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xxhash
from trees import assert_same
from twins import default, draw

import jaxcompress as jc
from jaxcompress._cli import main
from jaxcompress._files import sealed

HOSTILE = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**40, 2**60, 2**63, 2**64 + 1, 10**400, -(2**70)),
    *(0.5, 1e308, "", "x", "../x", "/etc/passwd", "a" * 5000, "\udc80", "int4", "float32", "I64"),
    *(
        [],
        {},
        [0],
        [[]],
        {"a": {}},
        [1, 2, 3],
        [2**40, 2**40],
        "0x1p99999",
        "nan",
        "__import__('os')",
    ),
    *({"maker": "minifloat", "exponent_bits": 10**9, "mantissa_bits": 1}, {"maker": "codebook"}),
    *({"axis": [-2], "size": 2**50}, {"axis": [-1, -1], "size": 1}, {"axis": [0], "size": 2}),
]


@contextlib.contextmanager
def limited(headroom=900 * 2**20):
    """No allocation beyond this much more than there is."""
    resource = pytest.importorskip("resource")
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + headroom
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree():
    w = draw(0, 32, 8)
    quantizers = ("int4", "uint3", "mxfp4", "nvfp4")
    out = {n: jc.Quantizer(n).quantize(w, 0) for n in quantizers}
    out["tiles"] = jc.Quantizer("int8", jc.per_block(4, 8)).quantize(w, 0)
    out["book"] = jc.Quantizer(jc.formats.codebook([-1, 0.5, 2])).quantize(w, 0)
    out["nodes"] = [(1, 2.5, "s", None), {"k": jax.random.key(1), "i": jnp.arange(3, dtype="int4")}]
    out["state"] = {"count": np.int32(3), "z": np.array([1 + 2j])}
    return out


def model():
    w = draw(0, 32, 8)
    names = ("int4", "uint3", "mxfp4", "nvfp4", "int8")
    return {n: {"kernel": jc.Quantizer(n).quantize(w, 0), "bias": jnp.ones(8)} for n in names}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Artifacts of every kind."""
    root = tmp_path_factory.mktemp("originals")
    jc.save_params(tree(), root / "file")
    jc.save_params(tree(), root / "shards", max_shard_bytes=400)
    jc.save_params(model(), root / "compressed-tensors", layout="compressed-tensors")
    shutil.copytree(root / "compressed-tensors", root / "foreign")
    header, data = read(root / "foreign/model.safetensors")
    header["__metadata__"] = {"format": "pt"}
    write(root / "foreign/model.safetensors", header, data)
    return root


def read(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header, data, seal=False):
    """A file of that header; `seal` makes its checksums good, as far as that is possible."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if seal and isinstance(header.get("__metadata__"), dict):
        metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
        rest = {k: v for k, v in header.items() if k != "__metadata__"}
        checksums = {}
        for name, entry in rest.items():
            with contextlib.suppress(TypeError, KeyError, ValueError):
                begin, end = entry["data_offsets"]
                checksums[name] = xxhash.xxh3_128_hexdigest(data[begin:end])
        metadata["xxh3_128"] = json.dumps(checksums)
        text = sealed.seal("__metadata__", metadata, rest, before=8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def damage(rng, raw):
    """Bytes as a bad disk, a broken transfer or a bored attacker leaves them."""
    raw, n = bytearray(raw), len(raw)
    at = rng.randrange(n) if rng.random() < 0.5 else rng.randrange(min(n, 300))
    kind = rng.randrange(7)
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        return bytes(raw) + rng.randbytes(rng.randrange(1, 100))
    if kind == 2:
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            raw[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif kind == 3:
        raw[at] = rng.choice((0, 255, 32, 34, 44, 48, 57, 91, 93, 123, 125, rng.randrange(256)))
    elif kind == 4:
        del raw[at : at + rng.randrange(1, 40)]
    elif kind == 5:
        raw[:8] = struct.pack("<Q", rng.choice((0, 1, 2, n, n - 8, n - 9, 2**32, 2**63, 2**64 - 1)))
    else:
        other = rng.randrange(n)
        raw[at : at + 16] = raw[other : other + 16]
    return bytes(raw)


def places(node, path=()):
    """The paths of all values in JSON."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def attack(rng, node):
    """Changes a value, a key or the order somewhere in JSON, in place."""
    for _ in range(rng.choice((1, 1, 2))):
        paths = list(places(node))
        if not paths:
            return
        *path, key = rng.choice(paths)
        parent = node
        for part in path:
            parent = parent[part]
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "__metadata__", "a/b", "0"])] = parent.pop(key)
        elif kind == 2 and type(parent[key]) is int:
            parent[key] += rng.choice((-1, 1, 8, 2**33))
        elif kind == 3:
            *other, last = rng.choice(paths)
            value = node
            for part in other:
                value = value[part]
            parent[key] = json.loads(json.dumps(value[last]))
        else:
            parent[key] = json.loads(json.dumps(rng.choice(HOSTILE)))


def attack_file(rng, path):
    header, data = read(path)
    about = json.loads(header["__metadata__"].get("jaxcompress", "{}"))
    inner = rng.random() < 0.6 and about
    attack(rng, about if inner else header)
    if inner:
        header["__metadata__"]["jaxcompress"] = json.dumps(about)
    write(path, header, data, seal=about != {})


def attack_json(rng, path):
    """An index or a configuration; those that we sealed are sealed again."""
    data = json.loads(path.read_text())
    about = json.loads(data.get("metadata", {}).get("jaxcompress", "{}"))
    inner = rng.random() < 0.6 and about
    attack(rng, about if inner else data)
    if inner:
        data["metadata"]["jaxcompress"] = json.dumps(about)
    if path.name == "config.json":
        note(path.parent, data.get("quantization_config"))
    elif isinstance(data.get("metadata"), dict):
        metadata = {k: v for k, v in data["metadata"].items() if k != "sha256"}
        rest = {k: v for k, v in data.items() if k != "metadata"}
        path.write_bytes(sealed.seal("metadata", metadata, rest))
        return
    path.write_text(json.dumps(data))


def note(folder, quantization):
    """Makes good what a model of ours notes about its configuration."""
    header, data = read(folder / "model.safetensors")
    if "jaxcompress" in header["__metadata__"]:
        about = json.loads(header["__metadata__"]["jaxcompress"])
        text = json.dumps(quantization, sort_keys=True, separators=(",", ":"))
        about["config"] = hashlib.sha256(text.encode()).hexdigest()
        header["__metadata__"]["jaxcompress"] = json.dumps(about)
        write(folder / "model.safetensors", header, data, seal=True)


KINDS = ("file", "shards", "compressed-tensors", "foreign")
COUNTS = default([100, 10_000], "100")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", ["damage", "attack"])
@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind, how, count, originals, tmp_path):
    source = originals / kind
    want = jc.load_params(source)
    names = sorted(p.name for p in source.iterdir())
    rng = random.Random(f"{kind} {how}")
    seen, slowest = collections.Counter(), 0.0
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    with limited():
        for _ in range(count):
            name = rng.choice([n for n in names if n.endswith(".json")] or names)
            name = rng.choice([name, rng.choice(names)])
            touched = {name, "model.safetensors"} & set(names)
            if how == "damage":
                (folder / name).write_bytes(damage(rng, (source / name).read_bytes()))
            elif name.endswith(".json"):
                attack_json(rng, folder / name)
            else:
                attack_file(rng, folder / name)
            lazy = how == "attack" and rng.random() < 0.3
            begin = time.perf_counter()
            try:
                found = jc.load_params(folder, lazy=lazy)
            except jc.ArtifactError as error:
                assert len(str(error)) > 20
                seen["refused"] += 1
            else:
                if how == "damage" and kind != "foreign":
                    assert_same(found, want)
                    seen["equal"] += 1
                else:
                    seen["loaded"] += 1
            slowest = max(slowest, time.perf_counter() - begin)
            assert sorted(os.listdir(folder)) == names
            assert os.listdir(tmp_path) == ["m"]
            for n in touched:
                shutil.copyfile(source / n, folder / n)
    assert seen["refused"] > count / 4
    assert slowest < 10
    print(f"\n{kind}, {how}: {count} mutations, {dict(seen)}, slowest {slowest:.2f} s")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("how", ["damage", "attack"])
def test_mutations_of_a_program(how, count, tmp_path):
    """Any file is damaged, or the manifest changed and sealed again; then loaded, shown and run."""
    fn, w, x = lambda w, x: {"y": x @ w}, jnp.eye(4), jnp.ones((1, 4))
    source, folder = tmp_path / "source", tmp_path / "m"
    jc.export.stablehlo(jc.quantize_aware(fn, "w8a8"), w, x, path=source)
    shutil.copytree(source, folder)
    names = sorted(p.name for p in source.iterdir())
    rng, seen = random.Random(f"program {how}"), collections.Counter()
    with limited(2**31):  # what XLA needs to compile
        for _ in range(count):
            name = rng.choice(names) if how == "damage" else "manifest.json"
            if how == "damage":
                (folder / name).write_bytes(damage(rng, (source / name).read_bytes()))
            else:
                data = json.loads((source / name).read_text())
                attack(rng, data)
                about = data.pop("stablehlo", None)
                about = about if isinstance(about, dict) else {}
                about.pop("sha256", None)
                (folder / name).write_bytes(sealed.seal("stablehlo", about, data))
            try:
                artifact = jc.export.load(folder)
                assert str(artifact.report) and repr(artifact)
                if seen["loaded"] < 20 or how == "damage":
                    np.testing.assert_array_equal(jax.tree.leaves(artifact.run(x))[0], x)
                    jc.export.verify(artifact)
            except jc.ArtifactError as error:
                assert len(str(error)) > 20
                seen["refused"] += 1
            else:
                seen["loaded"] += 1
            assert sorted(os.listdir(folder)) == names
            shutil.copyfile(source / name, folder / name)
    assert seen["refused"] > count / 4
    print(f"\nprogram, {how}: {count} mutations, {dict(seen)}")


@pytest.mark.parametrize("count", COUNTS)
def test_mutations_of_a_report(count, tmp_path, capsys):
    """`jaxcompress report` of a damaged result: shown, or one message and exit code 2."""
    source = {
        "tool": "jaxcompress",
        "schema_version": 1,
        "task": "t",
        "recipe": {"name": "r"},
        "rows": [],
        "metrics": {"before": {"accuracy": 0.9}, "after": {"accuracy": None}},
        "comparison": {"agreement": 0.5, "accuracy": {"low": 0.1, "high": 0.2}},
        "bytes": {part: {"before": 8, "after": 2} for part in ("parameters", "files")},
        "step_ms": {"of": "training", "before": 1.0, "after": 2.0, "ratio": 2.0},
    }
    rng, seen = random.Random(0), collections.Counter()
    with limited():
        for _ in range(count):
            if rng.random() < 0.5:
                raw = damage(rng, json.dumps(source).encode())
            else:
                data = json.loads(json.dumps(source))
                attack(rng, data)
                raw = json.dumps(data).encode()
            (tmp_path / "report.json").write_bytes(raw)
            code = main(["report", str(tmp_path)])
            assert code in (0, 2)
            assert (code == 2) == capsys.readouterr().err.startswith("jaxcompress: ")
            seen[code] += 1
    assert seen[2] > count / 4
    with capsys.disabled():
        print(f"\nreport.json: {count} mutations, {seen[0]} shown, {seen[2]} refused")
