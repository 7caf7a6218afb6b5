# SPDX-License-Identifier: Apache-2.0
"""AWQ and clip search against exhaustive search with the inputs themselves; smoothing, biases."""

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import formats
from jaxcompress._solvers.awq import awq
from jaxcompress._solvers.bias import bias_correction
from jaxcompress._solvers.clip import FACTORS, clip
from jaxcompress._solvers.equalize import equalize, equalize_three
from jaxcompress._solvers.rounder import Scaled
from jaxcompress._solvers.smooth import smooth
from tests.solvers.oracles import asymmetric, problem, symmetric

ROUNDERS = {"int4": (formats.int4, symmetric(-7, 7)), "uint3": (formats.uint3, asymmetric(7))}


def rounded(w, fit, size):
    return np.concatenate([fit(v)(v) for v in np.split(w, w.shape[1] // size, 1)], 1)


def exhaustive(w, x, fit, size, ratios=20):
    """auto_scale.py of llm-awq, in float64, with the outputs of one linear layer."""
    w, x = np.array(w, np.float64), np.array(x, np.float64)
    losses, scales = [], []
    for i in range(ratios):
        s = np.clip(np.abs(x).mean(0) ** (i / ratios), 1e-4, None)
        s = s / np.sqrt(s.max() * s.min())
        losses.append((((rounded(w * s, fit, size) / s - w) @ x.T) ** 2).sum())
        scales.append(s)
    return np.array(losses), scales


@pytest.mark.parametrize("name", ROUNDERS)
def test_awq_chooses_what_an_exhaustive_search_with_inputs_does(name):
    fmt, fit = ROUNDERS[name]
    for seed in range(4):
        w, h, x = problem(48, 32, seed)
        found = awq(w, h, np.abs(x).mean(0), fmt, group_size=16)
        losses, scales = exhaustive(w, x, fit, 16)
        np.testing.assert_allclose(found.losses, losses, rtol=1e-3)
        best = losses.argmin()
        assert best > 0  # the search has something to find here
        assert found.ratio == np.float32(best / 20)
        np.testing.assert_allclose(found.scale, scales[best], rtol=1e-5)


def test_weights_that_read_one_input_are_searched_together():
    w, h, x = problem(48, 32)
    a = np.abs(x).mean(0)
    whole, parts = (awq(v, h, a, formats.int4) for v in (w, [w[:16], w[16:]]))
    np.testing.assert_array_equal(whole.scale, parts.scale)
    with pytest.raises(jc.FormatError, match=r"same inputs, got \[\[16, 32\], \[32, 8\]\]"):
        awq([w[:16], w[16:, :8]], h, a, formats.int4)


@pytest.mark.parametrize("importance", ["none", "diagonal", "gram"])
def test_clip_chooses_what_an_exhaustive_search_does(importance):
    """For each output and group; auto_clip.py of llm-awq when it is the Gram matrix."""
    w, h, x = problem(24, 32)
    given = {"none": None, "diagonal": np.diag(h), "gram": h}[importance]
    for name, (fmt, fit) in ROUNDERS.items():
        found = np.asarray(clip(w, fmt, group_size=16, importance=given))
        for g in range(2):
            part = slice(16 * g, 16 * g + 16)
            v, errors, extents = np.array(w[:, part], np.float64), [], []
            for factor in FACTORS:
                a = factor * np.abs(v).max(1, keepdims=True)
                q = np.clip(v, -a, a)
                d = fit(q)(q) - v
                if importance == "gram":
                    d = d @ np.array(x, np.float64)[:, part].T
                errors.append((d**2 * (np.diag(h)[part] if importance == "diagonal" else 1)).sum(1))
                extents.append(a[:, 0])
            best = np.argmin(errors, 0)
            assert len(set(best.tolist())) > 1
            same = np.isclose(found[:, g], np.choose(best, extents), rtol=1e-5)
            # Clipped at both ends, the zero point of a uint3 is a tie of 3 and 4 in exact numbers.
            assert same.mean() >= (1.0 if name == "int4" else 0.9)


def test_leading_axes_are_problems_of_their_own():
    problems = [problem(8, 16, seed) for seed in range(3)]
    w, h, x = (np.stack(part) for part in zip(*problems))
    a = np.abs(x).mean(1)
    together = awq(w, h, a, formats.int4), clip(w, formats.int4, importance=h)
    for i in range(3):
        alone = awq(w[i], h[i], a[i], formats.int4), clip(w[i], formats.int4, importance=h[i])
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda a, i=i: a[i], together), alone
        )


def test_smoothing_leaves_the_product_and_shares_the_ranges():
    w, _, x = problem(8, 16)
    s = np.asarray(smooth(np.abs(x).max(0), np.abs(w).max(0)))
    np.testing.assert_allclose((x / s) @ (w * s).T, x @ w.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.abs(x / s).max(0), np.abs(w * s).max(0), rtol=1e-5)
    np.testing.assert_allclose(smooth([4.0, 0.0, 2.0], [1.0, 1.0, 0.0], 0.75), [4**0.75, 1, 1])
    one = np.asarray(smooth(np.abs(x).max(0), np.abs(w).max(0), 1.0))
    np.testing.assert_allclose(np.abs(x / one).max(0), 1, rtol=1e-6)


def test_equalizing_leaves_the_function_and_shares_the_ranges():
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(6, 4)) * [[9], [1], [1], [1], [2], [0]], rng.normal(size=(3, 6))
    s = np.asarray(equalize(np.abs(w1).max(1), np.abs(w2).max(0)))
    x = rng.normal(size=(5, 4))
    run = lambda a, b: np.maximum(x @ a.T, 0) @ b.T  # noqa: E731
    np.testing.assert_allclose(run(w1 / s[:, None], w2 * s), run(w1, w2), rtol=1e-5, atol=1e-5)
    ranges = np.abs(w1 / s[:, None]).max(1), np.abs(w2 * s).max(0)
    np.testing.assert_allclose(ranges[0][:5], ranges[1][:5], rtol=1e-5)
    assert s[5] == 1
    r = np.array([[8.0, 2.0, 0.0], [1.0, 3.0, 1.0], [4.0, 0.5, 1.0]])
    s, t = (np.asarray(a) for a in equalize_three(*r))
    scaled = np.stack([r[0] / s, r[1] * s / t, r[2] * t])
    np.testing.assert_allclose(scaled[:, :2], np.cbrt(r.prod(0))[None, :2].repeat(3, 0), rtol=1e-5)
    assert s[2] == t[2] == 1


def test_the_corrected_bias_keeps_the_mean_of_the_outputs():
    w, _, x = problem(8, 16)
    w_q = np.round(w)
    outputs = x @ w_q.T + np.asarray(bias_correction(w, w_q, x.mean(0)))
    np.testing.assert_allclose(outputs.mean(0), (x @ w.T).mean(0), rtol=1e-4, atol=1e-4)


def test_bad_input():
    w, h, x = problem(4, 8)
    a = np.abs(x).mean(0)
    bad = {
        r"alpha=2: expected a number from 0 to 1": lambda: smooth(a, a, 2),
        r"weight_max has the shape \[7\] and input_max \[8\]": lambda: smooth(a, a[:7]),
        r"after has negative values": lambda: equalize(a, -a),
        r"of the input_max are NaN": lambda: smooth(a * np.nan, a),
        r"shapes \[4, 8\] before, \[4, 7\] now": lambda: bias_correction(w, w[:, :7], a),
        r"factors=\(1.5,\): expected numbers": lambda: clip(w, formats.int4, factors=(1.5,)),
        r"importance of weights .* \[8\], got \[7\]": lambda: clip(
            w, formats.int4, importance=a[:7]
        ),
        r"ratios=0: expected how many": lambda: awq(w, h, a, formats.int4, ratios=0),
        r"no token came there": lambda: awq(w, 0 * h, a, formats.int4),
        r"nf4 takes no zero point": lambda: Scaled(formats.nf4, symmetric=False),
    }
    for message, call in bad.items():
        with pytest.raises(jc.JaxCompressError, match=message):
            call()
