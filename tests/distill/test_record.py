# SPDX-License-Identifier: Apache-2.0
"""Recordings: what is read is what the teacher says; interrupted, damaged and foreign ones."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import distill
from jaxcompress._files import safetensors

RNG = np.random.default_rng(0)
W = [RNG.normal(size=s).astype(np.float32) for s in ((4, 8), (8, 5))]
BATCHES = [RNG.normal(size=(n, 4)).astype(np.float32) for n in (3, 3, 2)]  # two shapes


def teacher(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


def by_hand(x):
    hidden = np.tanh(np.float64(x) @ W[0])
    return hidden @ np.float64(W[1]), hidden


def save(path, batches=BATCHES, **settings):
    return distill.record(teacher, batches, path, teacher_params=W, **settings)


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_logits_and_rows_of_several_batches(tmp_path):
    recording = save(tmp_path / "r")
    assert len(recording) == 3 and recording.rows == 8
    for found, x in zip(recording, BATCHES, strict=True):
        np.testing.assert_allclose(found, by_hand(x)[0], rtol=1e-5, atol=1e-5)
    everything = np.concatenate([by_hand(x)[0] for x in BATCHES])
    rows = np.array([7, 0, 3, 3, 6])
    np.testing.assert_allclose(recording.take(rows), everything[rows], rtol=1e-5, atol=1e-5)
    again = distill.Recording(tmp_path / "r")
    np.testing.assert_array_equal(again[-1], recording[2])
    with pytest.raises(IndexError, match="has 3 batches, asked for number 3"):
        recording[3]
    for rows, message in (([8], "row 8 of a recording with 8 rows"), ([0.5], "not int")):
        with pytest.raises(jc.JaxCompressError, match=message):
            recording.take(rows)


def test_top_k_features_and_dtype_are_the_loss_of_the_teacher(tmp_path):
    """The loss from a recording is the loss with the teacher at hand, features and all."""
    fit = distill.match("1", "1", distill.similarity(), weight=0.5)
    student = [w[:, :5] for w in (W[0], W[1][:5])]
    batches = [{"x": x, "y": np.arange(len(x)) % 5} for x in BATCHES]
    live = distill.loss_fn(
        teacher, teacher, distill.top_k_kl(2), match=fit, hard_labels="y", inputs="x"
    )
    stored = distill.loss_fn(teacher, None, distill.kl(), match=fit, hard_labels="y", inputs="x")
    live, stored = (jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (live, stored))
    recording = save(tmp_path / "r", batches, inputs="x", top_k=2, match=fit)
    for batch, outputs in zip(batches[:2], recording):
        want = live(student, batch, teacher_params=W)
        got = stored(student, batch, teacher_outputs=outputs)
        np.testing.assert_allclose(got[0][0], want[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], want[1])
    taken = recording.take([1, 7])["features"][0][0]
    hidden = np.concatenate([by_hand(x)[1] for x in BATCHES])
    np.testing.assert_allclose(taken, hidden[[1, 7]], rtol=1e-5, atol=1e-6)
    small = save(tmp_path / "s", top_k=2, dtype=jnp.bfloat16)
    assert small[0].log_probs.dtype == jnp.bfloat16 and small[0].indices.dtype == jnp.int32
    exact = recording[0]["output"].log_probs
    np.testing.assert_array_equal(small[0].log_probs, exact.astype(jnp.bfloat16))


def test_an_interrupted_call_is_resumed_with_the_same_bytes(tmp_path):
    save(tmp_path / "whole")
    runs, out = [], tmp_path / "r"

    def counted(params, x):
        jax.debug.callback(lambda n: runs.append(int(n)), jnp.array(x.shape[0]))
        return teacher(params, x)

    def interrupted():
        for i, x in enumerate(BATCHES):
            if out.exists():  # one at a time: what came before is on the disk
                assert len(list(out.glob("outputs-*"))) == i
            if i == 2:
                raise KeyboardInterrupt
            yield x

    with pytest.raises(KeyboardInterrupt):
        distill.record(counted, interrupted(), out, teacher_params=W)
    jax.effects_barrier()
    assert runs == [3, 3] and len(list(out.iterdir())) == 2
    with pytest.raises(jc.ArtifactError, match="no finished recording: it has 2 batches"):
        distill.Recording(out)
    (out / ".outputs-00002.safetensors-0a1b2c3d").write_bytes(b"left by a killed process")
    distill.record(counted, BATCHES, out, teacher_params=W)
    jax.effects_barrier()
    assert runs == [3, 3, 2]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("failing", [1, 2, "index"])
def test_a_full_disk_leaves_nothing_half(failing, tmp_path, monkeypatch):
    save(tmp_path / "whole")
    write, calls = safetensors.write, []

    def full(*args):
        calls.append(1)
        if len(calls) == failing:
            args[0].write(b"half")
            raise OSError(28, "No space left on device")
        return write(*args)

    def no_fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "write", full)
    if failing == "index":
        save(tmp_path / "r", BATCHES)
        (tmp_path / "r/recording.json").unlink()
        monkeypatch.setattr(os, "fsync", no_fsync)
    with pytest.raises(jc.ArtifactError, match="No space left on device. Nothing was changed"):
        save(tmp_path / "r")
    monkeypatch.undo()
    count = 3 if failing == "index" else failing - 1
    assert len(list((tmp_path / "r").iterdir())) == count
    save(tmp_path / "r")
    assert contents(tmp_path / "r") == contents(tmp_path / "whole")


def change(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damage_is_an_error(tmp_path):
    out = tmp_path / "r"
    recording = save(out)
    file, whole = out / "outputs-00001.safetensors", contents(out)
    change(file)
    with pytest.raises(jc.ArtifactError, match="outputs-00001.safetensors is damaged: `output`"):
        recording[1]
    with pytest.raises(jc.ArtifactError, match="Delete it and call record again"):
        save(out)
    file.write_bytes(whole[file.name][:-3])
    with pytest.raises(jc.ArtifactError, match="outputs-00001.safetensors is damaged: it has"):
        distill.Recording(out)
    file.unlink()
    with pytest.raises(jc.ArtifactError, match="cannot be read: No such file"):
        distill.Recording(out)
    assert len(save(out)) == 3 and contents(out) == whole  # made anew
    (out / "outputs-00001.safetensors").write_bytes(whole["outputs-00000.safetensors"])
    with pytest.raises(jc.ArtifactError, match="is not the file that recording.json was written"):
        distill.Recording(out)
    (out / "outputs-00001.safetensors").write_bytes(whole["outputs-00001.safetensors"])
    change(out / "recording.json", -80)
    with pytest.raises(jc.ArtifactError, match="recording.json is damaged"):
        distill.Recording(out)
    (out / "recording.json").write_text("{}")
    with pytest.raises(jc.ArtifactError, match="is damaged, or of another version"):
        distill.Recording(out)


def test_other_batches_settings_and_folders_are_errors(tmp_path):
    out = tmp_path / "r"
    save(out)
    for batches, settings, message in (
        (BATCHES[::-1], {}, "recorded with other inputs"),
        (BATCHES, {"top_k": 2}, "recorded with other settings"),
        (BATCHES, {"dtype": jnp.float16}, "recorded with other settings"),
    ):
        with pytest.raises(jc.ArtifactError, match=message):
            save(out, batches, **settings)
    with pytest.raises(jc.JaxCompressError, match="2 batches .* files of more: outputs-00002"):
        save(out, BATCHES[:2])
    (out / "notes.txt").touch()
    with pytest.raises(jc.ArtifactError, match="holds other things than a recording: notes.txt"):
        save(out)
    with pytest.raises(jc.ArtifactError, match="is no directory"):
        save(out / "notes.txt")
    with pytest.raises(jc.JaxCompressError, match="0 batches were given: nothing to record"):
        save(tmp_path / "none", [])
    with pytest.raises(jc.SiteError, match="'nothing' matches no site of the teacher"):
        save(tmp_path / "n", match=distill.match("*", "nothing", distill.cka()))
    with pytest.raises(jc.JaxCompressError, match=r"their first dimension must be that"):
        distill.record(lambda x: x.sum(), BATCHES, tmp_path / "scalar")
    assert not pathlib.Path(tmp_path / "n").exists()
