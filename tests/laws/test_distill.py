# SPDX-License-Identifier: Apache-2.0
"""Losses of distillation: each against a few lines of float64 NumPy, and the laws that all obey."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

import jaxcompress as jc
from jaxcompress import distill

# float32 against float64: a few hundred roundings of 2^-24, relative to the size of the loss.
FLOAT32 = 3e-5
# Gradients where nothing is left but rounding, relative to those of a student that differs.
ROUNDING = 1e-5
BF16 = 0.05  # operands are rounded to 8 bits before anything is computed


def KL(p, q):
    """Relative entropy over the last axis of log probabilities."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sum(np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0), -1)


def soft(x, T=1.0):
    return log_softmax(x / T, -1)


def oracle_jsd(s, t, beta, T):
    q, p = soft(s, T), soft(t, T)
    m = np.logaddexp(q + np.log(1 - beta), p + np.log(beta))
    return T**2 * (beta * KL(p, m) + (1 - beta) * KL(q, m))


def oracle_top_k(s, t, k, T):
    q, p, out = soft(s, T), soft(t, T), []
    for a, b in zip(q, p):
        top = np.argsort(-b, kind="stable")[:k]
        rest = [c for c in range(len(b)) if c not in top]
        pair = [np.append(x[top], logsumexp(x[rest])) for x in (b, a)]
        out.append(T**2 * KL(*pair))
    return np.array(out)


def oracle_dkd(s, t, y, alpha, beta, T):
    out = []
    for a, b, c in zip(s / T, t / T, y):
        rest = [i for i in range(len(a)) if i != c]
        pair = [soft(np.array([x[c], logsumexp(x[rest])])) for x in (b, a)]
        out.append(T**2 * (alpha * KL(*pair) + beta * KL(soft(b[rest]), soft(a[rest]))))
    return np.array(out)


def pearson_apart(a, b):
    """1 - correlation; half where one of them alone is constant, 0 where both are."""
    constant = [np.ptp(x) <= 1e-12 for x in (a, b)]
    return np.mean(constant) if any(constant) else 1 - np.corrcoef(a, b)[0, 1]


def oracle_dist(s, t):
    q, p = softmax(s, -1), softmax(t, -1)
    rows = np.mean([pearson_apart(a, b) for a, b in zip(q, p)])
    return rows + np.mean([pearson_apart(a, b) for a, b in zip(q.T, p.T)])


def direction(x):
    n = np.linalg.norm(x)
    return x / n if n else x


def oracle_cosine(s, t):
    return np.array([np.sum((direction(a) - direction(b)) ** 2) / 2 for a, b in zip(s, t)])


def oracle_attention(s, t):
    def maps(x):
        return np.array([direction(np.mean(v.reshape(-1, v.shape[-1]) ** 2, -1)) for v in x])

    return np.mean((maps(s) - maps(t)) ** 2)


def huber(x):
    return np.where(np.abs(x) < 1, x * x / 2, np.abs(x) - 0.5)


def oracle_rkd(s, t):
    def relations(x):
        x, n = x.reshape(len(x), -1), len(x)
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        d = d / (d[d > 0].mean() if (d > 0).any() else 1)
        angles = np.zeros((n, n, n))
        for i, j, k in np.ndindex(n, n, n):
            angles[i, j, k] = direction(x[i] - x[j]) @ direction(x[k] - x[j])
        return d, angles

    (ds, cs), (dt, ct) = relations(s), relations(t)
    return 25 * huber(ds - dt).mean() + 50 * huber(cs - ct).mean()


def oracle_similarity(s, t):
    def g(x):
        x = x.reshape(len(x), -1)
        return np.array([direction(row) for row in x @ x.T])

    return np.sum((g(s) - g(t)) ** 2) / len(s) ** 2


def oracle_pkt(s, t):
    def p(x):
        x = np.array([direction(v) for v in x.reshape(len(x), -1)])
        k = np.maximum((1 + x @ x.T) / 2, 1e-6)
        return k / k.sum(1, keepdims=True)

    return np.mean(p(t) * np.log(p(t) / p(s)))


def oracle_cka(s, t):
    def k(x):
        x = x.reshape(len(x), -1)
        h = np.eye(len(x)) - 1 / len(x)
        found = h @ x @ x.T @ h
        return found * (np.abs(found).max() > 1e-9 * np.abs(x @ x.T).max())  # all alike: 0

    a, b = k(s), k(t)
    if not a.any() or not b.any():  # as for `cosine`: half, where one has no direction
        return (a.any() != b.any()) / 2
    return 1 - np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


def oracle_minilm(s, t, heads):
    total = []
    for a, b in zip(s, t):  # sequences
        for h in range(heads):
            cut = [np.split(x, heads, -1)[h] for x in (b, a)]
            total.append(KL(*(soft(x @ x.T / x.shape[1] ** 0.5) for x in cut)))
    return np.mean(total)


def oracle_crd(s, t, T):
    s, t = (np.array([direction(v) for v in x]) for x in (s, t))
    out = []
    for i in range(len(s)):
        e = [np.exp(np.longdouble(s[i] @ t[j] / T)) for j in range(len(t))]
        out.append(-np.log(e[i] / sum(e)))
    return np.array(out, np.float64)


class Law(typing.NamedTuple):
    """One row of the table: a loss, its oracle, and what does not hold for it."""

    name: str
    loss: distill.Loss
    oracle: typing.Callable  # float64 (student, teacher[, labels]) -> per row, or one number
    shape: tuple = (6, 8)
    logits: bool = False  # a constant added to a row changes nothing
    zero: bool = True  # is 0 where student and teacher are equal
    extreme: bool = True  # the oracle itself holds at 1e4


LOGITS = [
    Law("kl", distill.kl(4.0), lambda s, t: 16 * KL(soft(t, 4), soft(s, 4))),
    Law("kl T=1", distill.kl(), lambda s, t: KL(soft(t), soft(s))),
    Law("reverse_kl", distill.reverse_kl(2.0), lambda s, t: 4 * KL(soft(s, 2), soft(t, 2))),
    Law("jsd", distill.jsd(0.3, 2.0), lambda s, t: oracle_jsd(s, t, 0.3, 2.0)),
    Law("jsd 0", distill.jsd(0.0), lambda s, t: KL(soft(t), soft(s))),
    Law("jsd 1", distill.jsd(1.0), lambda s, t: KL(soft(s), soft(t))),
    Law(
        "skew_kl", distill.skew_kl(0.2),
        lambda s, t: KL(soft(t), np.logaddexp(soft(t) + np.log(0.2), soft(s) + np.log(0.8))),
    ),
    Law(
        "skew_reverse_kl", distill.skew_reverse_kl(0.2),
        lambda s, t: KL(soft(s), np.logaddexp(soft(s) + np.log(0.2), soft(t) + np.log(0.8))),
    ),
    Law("top_k_kl", distill.top_k_kl(3, 2.0), lambda s, t: oracle_top_k(s, t, 3, 2.0)),
    Law("dkd", distill.dkd(1.0, 8.0, 4.0), lambda s, t, y: oracle_dkd(s, t, y, 1.0, 8.0, 4.0)),
    Law("dist", distill.dist(), oracle_dist),
    Law(
        "mse_logits", distill.mse_logits(),
        lambda s, t: np.mean(((s - t) - (s - t).mean(-1, keepdims=True)) ** 2, -1) / 2,
    ),
]  # fmt: skip
FEATURES = [
    Law("cosine", distill.cosine(), oracle_cosine),
    Law("fitnet", distill.fitnet(), lambda s, t: np.mean((s - t) ** 2, -1)),
    Law("attention_transfer", distill.attention_transfer(), oracle_attention, (5, 3, 2, 4)),
    Law("rkd", distill.rkd(), oracle_rkd),
    Law("similarity", distill.similarity(), oracle_similarity),
    Law("pkt", distill.pkt(), oracle_pkt),
    Law("cka", distill.cka(), oracle_cka),
    Law("minilm", distill.minilm(2), lambda s, t: oracle_minilm(s, t, 2), (2, 5, 8), extreme=False),
    Law("crd", distill.crd(0.1), lambda s, t: oracle_crd(s, t, 0.1), zero=False),
]
TABLE = [law._replace(logits=True) for law in LOGITS] + FEATURES
every = pytest.mark.parametrize("law", TABLE, ids=lambda law: law.name)


def pair(law, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=law.shape).astype(dtype) * 2 for _ in range(2)]


def labels_for(law, seed=0):
    if not law.loss.wants_labels:
        return {}
    rng = np.random.default_rng(seed)
    return {"labels": rng.integers(0, law.shape[-1], law.shape[:-1])}


@functools.cache
def compiled(law):
    """(value, gradients by student and teacher) as one program."""
    labels = labels_for(law)

    def loss(s, t, mask):
        return law.loss(s, t, mask=mask, **labels)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def call(law, s, t, mask=None):
    return compiled(law)(s, t, mask)[0]


def grad(law, s, t, mask=None):
    return compiled(law)(s, t, mask)[1][0]


def expected(law, s, t):
    return np.mean(law.oracle(s, t, *labels_for(law).values()))


def test_the_table_has_every_loss():
    made = {x.loss.name.split("(")[0] for x in TABLE}
    public = {n for n in dir(distill) if isinstance(getattr(distill, n), type(distill.kl))}
    others = {"loss_fn", "match", "row_loss", "batch_loss", "top_k", "uniform_layers", "record"}
    others |= {n for n in public if n.startswith("vocab_")} | {
        "ema",
        "ema_params",
        "mutual",
        "on_policy",
    }
    assert public - others <= made


@every
@pytest.mark.parametrize("seed", [0, 1])
def test_oracle_on_random_operands(law, seed):
    s, t = pair(law, seed, np.float32)
    np.testing.assert_allclose(
        call(law, s, t), expected(law, np.float64(s), np.float64(t)), rtol=FLOAT32, atol=1e-6
    )


@every
@pytest.mark.parametrize("kind", ["1e4", "equal numbers", "one hot"])
def test_oracle_on_extreme_operands(law, kind):
    s, t = pair(law, 2, np.float32)
    if kind == "1e4":
        s, t = 1e4 * np.sign(s), 1e4 * np.sign(t)
    elif kind == "equal numbers":
        s = np.full_like(s, 3.0)
    else:
        t = 1e4 * (np.arange(law.shape[-1]) == 1) * np.ones_like(t)
    found, gradient = call(law, s, t), grad(law, s, t)
    assert np.isfinite(found) and np.isfinite(gradient).all()
    if law.extreme or kind != "1e4":
        want = expected(law, np.float64(s), np.float64(t))
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@every
def test_gradient_against_finite_differences(law):
    with jax.enable_x64(True):
        s, t = pair(law, 3)
        g, rng = grad(law, s, t), np.random.default_rng(0)
        assert g.dtype == np.float64
        for _ in range(3):
            d, h = rng.normal(size=law.shape), 1e-5
            slope = (call(law, s + h * d, t) - call(law, s - h * d, t)) / (2 * h)
            np.testing.assert_allclose(np.sum(np.asarray(g) * d), slope, rtol=1e-6, atol=1e-8)


@every
def test_zero_at_equality(law):
    s, t = pair(law, 4, np.float32)
    scale = float(jnp.abs(grad(law, s, t)).max())
    if law.zero:
        assert abs(call(law, t, t)) <= 1e-6 * (1 + float(call(law, s, t)))
        assert jnp.abs(grad(law, t, t)).max() <= ROUNDING * scale
    else:  # smallest there among the pairings of one batch
        assert call(law, t, t) < call(law, t[::-1].copy(), t)


@every
def test_teacher_gets_exactly_zero_gradient(law):
    s, t = pair(law, 5, np.float32)
    np.testing.assert_array_equal(compiled(law)(s, t, None)[1][1], 0)


@pytest.mark.parametrize("law", [x for x in TABLE if x.logits], ids=lambda x: x.name)
def test_a_constant_added_to_logits_changes_nothing(law):
    s, t = pair(law, 6, np.float32)
    shift = np.float32([[64.0], [-32.0], [16.0], [0.0], [8.0], [-8.0]])
    for a, b in ((s + shift, t), (s, t + shift)):
        np.testing.assert_allclose(call(law, a, b), call(law, s, t), rtol=1e-4)


@every
def test_eager_vmap_and_bf16(law):
    s, t = pair(law, 7, np.float32)
    f, labels = compiled(law), labels_for(law)
    value, (gradient, _) = f(s, t, None)
    if law.name in ("kl", "rkd"):
        np.testing.assert_allclose(law.loss(s, t, **labels), value, rtol=1e-5)
    many, (slopes, _) = jax.jit(jax.vmap(f, (0, 0, None)))(np.stack([t, s]), np.stack([s, t]), None)
    np.testing.assert_allclose(many[1], value, rtol=1e-5)
    bound = 1e-5 * float(jnp.abs(gradient).max())
    np.testing.assert_allclose(slopes[1], gradient, rtol=1e-4, atol=bound)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (s, t)]
    found, (slope, _) = f(*low, None)
    assert found.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, value, rtol=BF16, atol=1e-3)
    # exactly the float32 loss of the rounded operands: nothing inside is bf16
    np.testing.assert_allclose(found, f(*(np.float32(x) for x in low), None)[0], rtol=1e-5)


@every
def test_mask_is_leaving_out(law):
    s, t = pair(law, 8, np.float32)
    axis = 1 if law.name == "minilm" else 0
    n = law.shape[axis]
    keep = np.arange(n) % 3 != 1
    mask = np.broadcast_to(keep, law.shape[: axis + 1])
    bad_s, bad_t = s.copy(), t.copy()
    np.moveaxis(bad_s, axis, 0)[~keep] = np.nan  # whatever is there
    np.moveaxis(bad_t, axis, 0)[~keep] = np.inf
    some = [np.compress(keep, x, axis) for x in (s, t)]
    labels = {k: v[keep] for k, v in labels_for(law).items()}
    want = jax.jit(law.loss)(*some, **labels) if not labels else law.loss(*some, **labels)
    np.testing.assert_allclose(call(law, bad_s, bad_t, mask=mask), want, rtol=1e-5, atol=1e-7)
    g = np.moveaxis(np.asarray(grad(law, bad_s, bad_t, mask=mask)), axis, 0)
    np.testing.assert_array_equal(g[~keep], 0)
    assert np.isfinite(g).all() and np.abs(g[keep]).max() > 0
    # nothing left: zero, and a zero gradient
    none = np.zeros(mask.shape)
    assert call(law, bad_s, bad_t, mask=none) == 0
    np.testing.assert_array_equal(grad(law, bad_s, bad_t, mask=none), 0)


@pytest.mark.parametrize("law", [x for x in TABLE if x.name != "minilm"], ids=lambda x: x.name)
def test_weight_two_is_being_there_twice(law):
    if law.name == "crd":
        pytest.skip("an example that is there twice is its own negative")
    s, t = pair(law, 9, np.float32)
    weights = np.float32([2.0] + [1.0] * (len(s) - 1))
    labels = {k: np.append(v, v[:1]) for k, v in labels_for(law).items()}
    want = law.loss(*(np.concatenate([x, x[:1]]) for x in (s, t)), **labels)
    np.testing.assert_allclose(call(law, s, t, mask=weights), want, rtol=2e-5)


ROWS = [x for x in TABLE if x.name in ("kl", "cosine", "fitnet", "mse_logits", "dkd")]


@pytest.mark.parametrize("law", ROWS, ids=lambda x: x.name)
def test_reductions(law):
    s, t = pair(law, 10, np.float32)
    maker = getattr(distill, law.name)
    settings = {"kl": (4.0,), "dkd": (1.0, 8.0, 4.0)}.get(law.name, ())
    rows = law.oracle(np.float64(s), np.float64(t), *labels_for(law).values())
    for reduction, want in (("none", rows), ("sum", rows.sum()), ("mean", rows.mean())):
        loss = maker(*settings, reduction=reduction)
        np.testing.assert_allclose(loss(s, t, **labels_for(law)), want, rtol=FLOAT32, atol=1e-6)
    with pytest.raises(jc.JaxCompressError, match="reduction='median'; it is one of"):
        maker(*settings, reduction="median")
