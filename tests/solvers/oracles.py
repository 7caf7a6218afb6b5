# SPDX-License-Identifier: Apache-2.0
"""The published loops in NumPy and float64, and problems to solve with them."""

import numpy as np


def problem(out, n, seed=0, tokens=None):
    """Weights with a few large ones, and inputs that are correlated and of different sizes."""
    rng = np.random.default_rng(seed)
    mix = np.eye(n) + 1.5 * rng.normal(size=(n, n)) / np.sqrt(n)
    x = rng.normal(size=(tokens or 4 * n, n)) @ mix * rng.uniform(0.2, 2.0, n)
    w = rng.standard_t(5, size=(out, n))
    return w.astype(np.float32), (x.T @ x).astype(np.float32), x.astype(np.float32)


def damped(h, damping=0.01):
    """H + λ I; dead inputs have the mean of the others."""
    h = np.array(h, np.float64)
    dead = np.diag(h) == 0
    mean = np.diag(h).sum() / max((~dead).sum(), 1)
    h[dead, dead] = mean
    return h + damping * mean * np.eye(len(h)), dead


def symmetric(low, high):
    """Finds and applies the scale of absmax: v [out, n] -> a function of v [out, m]."""

    def fit(v):
        scale = np.abs(v).max(1, keepdims=True) / high
        scale = np.where(scale == 0, 1, scale)
        return lambda v: np.clip(np.round(v / scale), low, high) * scale

    return fit


def asymmetric(levels):
    """Finds and applies scale and zero point of min-max."""

    def fit(v):
        low, high = np.minimum(v.min(1, keepdims=True), 0), np.maximum(v.max(1, keepdims=True), 0)
        scale = np.where(high > low, (high - low) / levels, 1)
        zero = np.round(-low / scale)
        return lambda v: (np.clip(np.round(v / scale) + zero, 0, levels) - zero) * scale

    return fit


def table_of(values, top):
    """Finds and applies the scale of absmax for any grid: the nearest value."""
    values = np.asarray(values, np.float64)

    def fit(v):
        scale = np.abs(v).max(1, keepdims=True) / top
        nearest = lambda v: values[np.abs(v[..., None] / scale[..., None] - values).argmin(-1)]  # noqa: E731
        return lambda v: nearest(v) * scale

    return fit


def gptq(w, h, fit, group=None, act_order=False, static=False, damping=0.01, mask=None):
    """The loop of IST-DASLab/gptq without blocks, so that scales of groups are up to date."""
    w, (h, dead) = np.array(w, np.float64), damped(h, damping)
    out, n = w.shape
    w[:, dead] = 0
    if mask is not None:
        w = np.where(mask, w, 0)
    size = group or n
    static = static or group is None
    fitted = [fit(w[:, i : i + size]) for i in range(0, n, size)] if static else []
    order = np.argsort(-np.where(dead, 0, np.diag(h)), kind="stable") if act_order else np.arange(n)
    w, h = w[:, order], h[np.ix_(order, order)]
    mask = np.ones(w.shape, bool) if mask is None else mask[:, order]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for i in range(n):
        if not static and i % size == 0:
            now = fit(np.where(mask, w, 0)[:, i : i + size])
        rounding = fitted[order[i] // size] if static else now
        q[:, i] = np.where(mask[:, i], rounding(w[:, i : i + 1])[:, 0], 0)
        w[:, i:] -= np.outer((w[:, i] - q[:, i]) / u[i, i], u[i, i:])
    return q[:, np.argsort(order)]


def obq(w, h, round_at, damping=0.01):
    """Brute force: after each input the best weights of those that are left, by an inverse.

    Minimizes (w0 - v) H (w0 - v)ᵀ over the free entries of v, the others fixed at what they were
    rounded to: no Cholesky factor and no running correction.
    """
    w0, (h, _) = np.array(w, np.float64), damped(h, damping)
    n = w0.shape[1]
    v = w0.copy()
    for i in range(n):
        v[:, i] = round_at(v, i)
        free = np.arange(i + 1, n)
        if free.size:
            fixed = np.arange(i + 1)
            gap = (v - w0)[:, fixed]
            # The gradient over the free entries is zero.
            v[:, free] = w0[:, free] - gap @ h[np.ix_(fixed, free)] @ np.linalg.inv(
                h[np.ix_(free, free)]
            )
    return v


def loss(w, q, h):
    """(w - q) H (w - q)ᵀ for each output."""
    d = np.array(w, np.float64) - np.asarray(q, np.float64)
    return np.einsum("oi,ij,oj->o", d, np.array(h, np.float64), d)
