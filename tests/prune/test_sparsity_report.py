# SPDX-License-Identifier: Apache-2.0
"""Multiplications that are left, against loops that count them."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)


def sparse(*shape):
    return np.where(RNG.random(shape) < 0.3, RNG.normal(size=shape), 0).astype(np.float32)


def test_matmul_scan_attention_and_embedding():
    params = {"table": sparse(9, 4), "stack": sparse(3, 4, 4), "out": sparse(4, 2)}
    ids = np.array([[1, 2, 3, 8, 0]])

    def model(p, ids):
        x = p["table"][ids]
        x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["stack"])[0]
        scores = jnp.einsum("bij,bkj->bik", x, x)
        return scores, x @ p["out"]

    found = prune.report(model)(params, ids)
    rows = {row.site: row for row in found.rows}
    assert rows["stack"].left == 5 * np.count_nonzero(params["stack"])
    assert rows["stack"].multiplications == 5 * 3 * 16
    assert rows["out"].left == 5 * np.count_nonzero(params["out"])
    np.testing.assert_allclose(rows["out"].sparsity, (params["out"] == 0).mean())
    (other,) = set(rows) - {"stack", "out"}
    assert rows[other].sparsity is None and rows[other].left == 5 * 5 * 4
    data = json.loads(found.to_json())
    assert data["left"] == found.left == sum(row.left for row in found.rows)
    assert f"{found.left:,} of {found.multiplications:,}" in str(found)
    stored = {k: jc.SparseTensor.of(v) for k, v in params.items()}
    assert prune.report(model)(stored, ids).rows == found.rows


def test_convolution_with_groups():
    kernel, x = sparse(6, 2, 3, 3), np.ones((2, 4, 5, 5), np.float32)  # OIHW, two groups

    def model(p, x):
        return lax.conv_general_dilated(x, p, (1, 1), "SAME", feature_group_count=2)

    (row,) = prune.report(model)(kernel, x).rows
    count = 0
    out = jax.eval_shape(model, kernel, x).shape
    for _, o, _, _ in itertools.product(*map(range, out)):
        count += np.count_nonzero(kernel[o])
    assert row.left == count and row.multiplications == np.prod(out) * 2 * 3 * 3
