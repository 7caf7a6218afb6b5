# SPDX-License-Identifier: Apache-2.0
"""SparseGPT and Wanda against their published loops in NumPy and float64; exact counts."""

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import formats
from jaxcompress._solvers.gptq import gptq
from jaxcompress._solvers.rounder import find_scales, round_to
from jaxcompress._solvers.sparsegpt import sparsegpt
from jaxcompress._solvers.wanda import wanda
from tests.solvers.oracles import damped, loss, problem, symmetric

# A float32 score may be on the other side of the threshold than its float64 twin.
SAME_OUTPUTS = 0.97


def most(scores, count):
    """Mask of the largest by a stable sort: of equal ones the first."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def published(w, h, sparsity=None, nm=None, block=128, fit=None):
    """The loop of IST-DASLab/sparsegpt, not lazy, with exact counts."""
    w, (h, dead) = np.array(w, np.float64), damped(h)
    w[:, dead] = 0
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    rounding = fit(w) if fit else lambda v: v
    out, n = w.shape
    mask = np.ones(w.shape, bool)
    for i in range(n):
        scores = w**2 / np.diag(u) ** 2
        if nm is None and i % block == 0:
            end = min(i + block, n)
            pruned = round(end * out * sparsity) - round(i * out * sparsity)
            mask[:, i:end] = most(scores[:, i:end], out * (end - i) - pruned)
        if nm is not None and i % nm[1] == 0:
            for row, score in zip(mask, scores):
                row[i : i + nm[1]] = most(score[i : i + nm[1]], nm[0])
        q = np.where(mask[:, i], rounding(w[:, i : i + 1])[:, 0], 0)
        e = (w[:, i] - q) / u[i, i]
        w[:, i:] -= np.outer(e, u[i, i:])
        w[:, i] = q
    return w, mask


@pytest.mark.parametrize(
    "settings",
    [
        {"nm": (2, 4)},
        {"sparsity": 0.5, "block": 16},
        {"sparsity": 0.37, "block": 24, "fit": symmetric(-7, 7)},
        {"nm": (4, 8), "fit": symmetric(-7, 7)},
    ],
    ids=["2:4", "half", "some and int4", "4:8 and int4"],
)
def test_sparsegpt_is_the_published_loop(settings):
    w, h, _ = problem(64, 40)
    h[:, 7] = h[7] = 0
    wanted, mask = published(w, h, **settings)
    given = {k: v for k, v in settings.items() if k != "fit"}
    result = sparsegpt(w, h, rounder=formats.int4 if "fit" in settings else None, **given)
    same = np.isclose(np.asarray(result.w, np.float64), wanted, rtol=1e-3, atol=1e-4).all(-1)
    assert same.mean() >= SAME_OUTPUTS
    assert (np.asarray(result.mask) == mask).all(-1).mean() >= SAME_OUTPUTS
    assert not np.asarray(result.w)[~np.asarray(result.mask)].any()
    if "nm" in settings:
        n, m = settings["nm"]
        assert (np.asarray(result.mask).reshape(64, -1, m).sum(-1) == n).all()
    else:
        assert (~np.asarray(result.mask)).sum() == round(64 * 40 * settings["sparsity"])
    alive = np.where(np.arange(40) == 7, 0, w)
    np.testing.assert_allclose(result.loss, loss(alive, result.w, damped(h)[0]), rtol=1e-3)


def test_ties_do_not_change_the_count():
    result = sparsegpt(np.ones((8, 12), np.float32), np.eye(12), sparsity=0.3, block=5)
    assert (~np.asarray(result.mask)).sum() == round(96 * 0.3)


def test_without_sparsity_joint_pruning_is_gptq():
    w, h, _ = problem(64, 40)
    ours = sparsegpt(w, h, sparsity=0.0, rounder=formats.int4, group_size=8, block=8)
    wanted = gptq(w, h, formats.int4, group_size=8, block=8)
    np.testing.assert_array_equal(ours.codes, wanted.codes)
    np.testing.assert_array_equal(ours.w, wanted.w_q)


def test_gptq_honours_the_mask_that_sparsegpt_chose():
    w, h, _ = problem(64, 40)
    mask = np.asarray(sparsegpt(w, h, nm=(2, 4)).mask)
    values = np.asarray(gptq(w, h, formats.int4, mask=mask).w_q)
    assert not values[~mask].any() and values[mask].any()


def test_joint_is_better_than_one_after_the_other():
    """On the calibration data, over all outputs, in each of 4 problems."""
    for seed in range(4):
        w, h, _ = problem(64, 40, seed)
        joint = sparsegpt(w, h, nm=(2, 4), rounder=formats.int3)
        pruned = np.asarray(sparsegpt(w, h, nm=(2, 4)).w)
        _, after = round_to(pruned, formats.int3, find_scales(pruned, formats.int3))
        assert loss(w, joint.w, h).sum() < loss(w, after, h).sum()


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"nm": (2, 4)}])
def test_wanda_is_the_published_selection(settings):
    w, h, _ = problem(1024, 40)
    w = np.round(w)  # with many equal scores
    norm = np.sqrt(np.diag(h)).round()
    size, keep = (4, 2) if "nm" in settings else (40, 40 - round(40 * settings["sparsity"]))
    scores = (np.abs(w) * norm[None]).reshape(-1, size)
    wanted = np.stack([most(row, keep) for row in scores]).reshape(w.shape)
    np.testing.assert_array_equal(wanda(w, norm, **settings), wanted)


def test_with_equal_norms_wanda_is_magnitude():
    w = problem(8, 40)[0]
    wanted = np.stack([most(np.abs(row), 20) for row in w])
    np.testing.assert_array_equal(wanda(w, np.full(40, 3.0), sparsity=0.5), wanted)


def test_leading_axes_are_problems_of_their_own():
    problems = [problem(16, 16, seed) for seed in range(3)]
    w, h = (np.stack(part) for part in list(zip(*problems))[:2])
    together = sparsegpt(w, h, nm=(2, 4))
    masks = wanda(w, np.sqrt(np.diagonal(h, axis1=1, axis2=2)), nm=(2, 4))
    for i in range(3):
        alone = sparsegpt(w[i], h[i], nm=(2, 4))
        found = jax.tree.map(lambda a, i=i: a[i], together)
        jax.tree.map(np.testing.assert_array_equal, found, alone)
        np.testing.assert_array_equal(masks[i], wanda(w[i], np.sqrt(np.diag(h[i])), nm=(2, 4)))


BAD = {
    "neither": ({}, "say one of both"),
    "both": ({"sparsity": 0.5, "nm": (2, 4)}, "say one of both"),
    "all": ({"sparsity": 1.0}, r"sparsity=1.0: expected a fraction in \[0, 1\)"),
    "NaN": ({"sparsity": np.nan}, "sparsity=nan: expected a fraction"),
    "N > M": ({"nm": (5, 4)}, r"nm=\(5, 4\): N of every M inputs are kept"),
    "M": ({"nm": (2, 5)}, r"groups of 5 do not divide 8 inputs"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    settings, message = BAD[case]
    w = np.ones((2, 8), np.float32)
    for solve, h in ((wanda, np.ones(8)), (sparsegpt, np.eye(8))):
        with pytest.raises(jc.JaxCompressError, match=message):
            solve(w, h, **settings)


def test_bad_groups():
    with pytest.raises(jc.FormatError, match="one has to be a multiple of the other"):
        sparsegpt(np.ones((2, 12)), np.eye(12), nm=(2, 4), rounder=formats.int4, group_size=6)
    with pytest.raises(jc.FormatError, match=r"norm of weights \[2, 8\].* \[8\], got \[8, 8\]"):
        wanda(np.ones((2, 8)), np.eye(8), nm=(2, 4))
