# SPDX-License-Identifier: Apache-2.0
"""`vocab_kl` and its relatives against losses of the full logits, chunked, padded, sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax

import jaxcompress as jc
from jaxcompress import distill

TOKENS, D, E, VOCAB = 13, 6, 5, 24
ROUNDING = 1e-6  # sums in another order


def operands(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((TOKENS, D), (D, VOCAB), (TOKENS, E), (E, VOCAB))
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


MASK = np.arange(TOKENS) % 4 != 1
LABELS = np.random.default_rng(1).integers(0, VOCAB, TOKENS)


def full_kl(q, p):
    return np.sum(np.exp(p) * (p - q), -1)


def full_jsd(q, p):
    m = np.logaddexp(q + np.log(0.7), p + np.log(0.3))
    return 0.3 * full_kl(m, p) + 0.7 * full_kl(m, q)


CASES = {
    "kl": (distill.vocab_kl, full_kl, {}),
    "reverse_kl": (distill.vocab_reverse_kl, lambda q, p: full_kl(p, q), {}),
    "jsd": (distill.vocab_jsd, full_jsd, {"beta": 0.3}),
}
divergences = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def unfused(divergence, h, w, t, v, T, mask=None, labels=None, alpha=1.0):
    """The same by NumPy, in float64, from full logits."""
    h, w, t, v = (np.float64(x) for x in (h, w, t, v))
    rows = T**2 * divergence(log_softmax(h @ w / T, -1), log_softmax(t @ v / T, -1))
    if labels is not None:
        own = log_softmax(h @ w, -1)[np.arange(len(h)), labels]
        rows = alpha * rows - (1 - alpha) * own
    return np.average(rows, weights=mask)


def close(a, b, tolerance=ROUNDING):
    scale = max(1e-30, float(jnp.abs(jnp.asarray(b)).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.cover
@divergences
@pytest.mark.parametrize("mask, labels", [(None, None), (MASK, LABELS)], ids=["plain", "mixed"])
def test_value_and_gradients(case, mask, labels):
    f, divergence, settings = case
    alpha = 1.0 if labels is None else 0.7
    extra = {} if labels is None else {"labels": labels, "alpha": alpha}
    ops = operands()

    def fused(*ops, chunk=None):
        return f(*ops, temperature=2.0, mask=mask, chunk=chunk, **settings, **extra)

    value, grads = jax.value_and_grad(fused, (0, 1, 2, 3))(*ops)
    want = unfused(divergence, *ops, 2.0, mask, labels, alpha)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(fused(*ops), want, rtol=1e-5)  # also where nothing is derived
    for g in grads[2:]:
        np.testing.assert_array_equal(g, 0)
    # finite differences of the float64 twin, in random directions
    rng, step = np.random.default_rng(2), 1e-6
    for i in (0, 1):
        d = rng.normal(size=ops[i].shape)
        at = [
            unfused(
                divergence,
                *(np.float64(x) + s * step * d if k == i else x for k, x in enumerate(ops)),
                2.0, mask, labels, alpha,
            )
            for s in (1, -1)
        ]  # fmt: skip
        np.testing.assert_allclose(np.sum(grads[i] * d), (at[0] - at[1]) / 2 / step, rtol=1e-4)
    for chunk in (1, 5, 64):  # divides, leaves a rest, is larger than all tokens
        again, more = jax.value_and_grad(lambda *o, c=chunk: fused(*o, chunk=c), (0, 1))(*ops)
        close(again, value)
        for a, b in zip(more, grads):
            close(a, b)


def test_teacher_as_logits_and_top_k():
    h, w, t, v = operands(3)
    want = jax.value_and_grad(distill.vocab_kl, (0, 1))(h, w, t, v, temperature=2.0)
    got = jax.value_and_grad(distill.vocab_kl, (0, 1))(h, w, t @ v, temperature=2.0)
    jax.tree.map(close, got, want)
    for k in (4, VOCAB):
        stored = distill.top_k(t @ v, k)
        got = jax.jit(jax.value_and_grad(distill.vocab_kl, (0, 1)))(h, w, stored)
        bucketed = jax.value_and_grad(lambda h, w, k=k: distill.top_k_kl(k)(h @ w, t @ v), (0, 1))
        want = jax.jit(bucketed)(h, w)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), got, want)
        again = distill.kl()(h @ w, stored.logits(h @ w))
        np.testing.assert_allclose(again, want[0], rtol=1e-5)


@pytest.mark.parametrize("teacher", ["hidden", "top k"])
def test_head_sharded_over_the_vocabulary(teacher):
    h, w, t, v = operands(4)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "words"))
    h, t = h[:12], t[:12]
    labels, split = LABELS[:12], P(None, "words")
    stored = (t, v) if teacher == "hidden" else (distill.top_k(t @ v, 3), None)
    data = P("data", None)
    specs = (data, split) if teacher == "hidden" else (distill.TopK(data, data), None)
    settings = {"alpha": 0.5, "chunk": 5}

    def local(h, w, labels, t, v):
        found = distill.vocab_kl(h, w, t, v, labels=labels, axis_name="words", **settings)
        return jax.lax.pmean(found, "data")

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(data, split, P("data"), *specs), out_specs=P()
    )
    got = jax.jit(jax.value_and_grad(sharded, (0, 1)))(h, w, labels, *stored)
    want = jax.value_and_grad(distill.vocab_kl, (0, 1))(h, w, *stored, labels=labels, **settings)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), got, want)


def test_tokens_sharded_over_data_and_vmap():
    h, w, t, v = operands(7)
    h, t = h[:12], t[:12]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def local(h, w, t, v):
        return jax.lax.pmean(distill.vocab_kl(h, w, t, v, chunk=4), "data")

    split, whole = P("data", None), P(None, None)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(split, whole, split, whole), out_specs=P())
    want = jax.value_and_grad(distill.vocab_kl, (0, 1))(h, w, t, v)
    got = jax.jit(jax.value_and_grad(sharded, (0, 1)))(h, w, t, v)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), got, want)
    halves = jax.vmap(lambda h, t: distill.vocab_kl(h, w, t, v, chunk=4))
    close(halves(h.reshape(2, 6, D), t.reshape(2, 6, E)).mean(), want[0])


def test_masked_tokens_and_bf16():
    h, w, t, v = operands(5)
    bad = h.at[~MASK].set(jnp.nan)
    f = jax.value_and_grad(lambda h, m: distill.vocab_kl(h, w, t, v, mask=m, chunk=4))
    value, g = f(bad, MASK)
    want = distill.vocab_kl(h[MASK], w, t[MASK], v)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_array_equal(g[~MASK], 0)
    value, g = f(bad, np.zeros(TOKENS))
    assert value == 0
    np.testing.assert_array_equal(g, 0)
    low = [x.astype(jnp.bfloat16) for x in (h, w, t, v)]
    value, g = jax.value_and_grad(distill.vocab_kl)(*low)
    assert value.dtype == jnp.float32 and g.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        value, unfused(full_kl, *(np.float32(x) for x in low), 1.0), rtol=1e-5
    )


@divergences
def test_zero_at_equality_and_finite_at_extremes(case):
    f, _, settings = case
    h, w, t, v = operands(6)
    value, g = jax.value_and_grad(lambda h: f(h, w, t, v, **settings))(h)
    same, zero = jax.value_and_grad(lambda h: f(h, w, jax.lax.stop_gradient(h), w, **settings))(h)
    assert abs(same) <= 1e-6 * value and jnp.abs(zero).max() <= 1e-5 * jnp.abs(g).max()
    value, g = jax.value_and_grad(lambda h: f(1e4 * h, w, 1e4 * t, v, **settings))(h)
    assert np.isfinite(value) and np.isfinite(g).all()


def test_nothing_of_the_size_of_all_logits():
    shapes = [(512, 8), (8, 1000), (512, 8), (8, 1000)]
    f = jax.value_and_grad(lambda *o: distill.vocab_kl(*o, chunk=64), (0, 1))
    compiled = jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 1000 * 4


WRONG = [
    ({"v": (E, VOCAB + 1)}, {}, "different vocabularies: 24 words of the student and 25 of"),
    ({"t": (TOKENS + 1, E)}, {}, r"teacher_hidden \[14, 5\].* do not match"),
    ({"w": (D + 1, VOCAB)}, {}, r"student_head \[7, 24\].* do not match"),
    ({}, {"temperature": 0.0}, "temperature=0.0; it must be positive"),
    ({}, {"mask": np.ones(3)}, r"mask \[3\] for 13 tokens"),
    ({}, {"labels": LABELS + VOCAB, "alpha": 0.5}, "is out of range: the vocabulary has 24 words"),
    ({}, {"alpha": 0.5}, "alpha=0.5 leaves the rest to labels"),
    ({}, {"chunk": 0}, "chunk=0; it must be positive"),
]


@pytest.mark.parametrize("shapes, settings, message", WRONG, ids=lambda x: str(x)[:20])
def test_errors(shapes, settings, message):
    ops = dict(zip("hwtv", operands()))
    ops |= {name: jnp.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(jc.JaxCompressError, match=message):
        distill.vocab_kl(*ops.values(), **settings)


def test_labels_out_of_range_inside_jit_are_nan():
    f = jax.jit(lambda y: distill.vocab_kl(*operands(), labels=y, alpha=0.5))
    assert np.isfinite(f(LABELS)) and np.isnan(f(LABELS + VOCAB))


def test_only_kl_takes_a_top_k():
    h, w, t, v = operands()
    with pytest.raises(jc.JaxCompressError, match="a stored top k says too little"):
        distill.vocab_reverse_kl(h, w, distill.top_k(t @ v, 2))
