# SPDX-License-Identifier: Apache-2.0
"""`loss_fn` and `match` against the same sums written by hand."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from twins import draw

import jaxcompress as jc
from jaxcompress import distill

ROUNDING = 1e-6


def layers(seed, width, depth=3, d=4, classes=5):
    sizes = [d, *[width] * (depth - 1), classes]
    return [draw(10 * seed + i, *s) / 2 for i, s in enumerate(zip(sizes, sizes[1:]))]


def model(params, x):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return x @ params[-1]


def features(params, x):
    seen = []
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
        seen.append(x)
    return seen


STUDENT, TEACHER = layers(0, 6), layers(1, 8)
X = draw(2, 7, 4)
Y = jnp.arange(7) % 5
KL = distill.kl(temperature=2.0)


def value(loss, *args, **kwargs):
    return jax.value_and_grad(loss, has_aux=True)(*args, **kwargs)


def same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=ROUNDING), got, want)


def test_teachers_logits():
    loss = distill.loss_fn(model, lambda x: model(TEACHER, x), KL)
    (got, metrics), g = value(loss, STUDENT, X)
    want = jax.value_and_grad(lambda p: KL(model(p, X), model(TEACHER, X)))(STUDENT)
    same((got, g), want)
    assert sorted(metrics) == ["distill", "loss"] and metrics["loss"] == got
    passed = distill.loss_fn(model, model, KL)
    same(value(passed, STUDENT, X, teacher_params=TEACHER)[0][0], got)
    g = jax.grad(lambda t: passed(STUDENT, X, teacher_params=t)[0])(TEACHER)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), g)


@pytest.mark.parametrize(
    "labels, batch", [(True, (X, Y)), ("y", {"x": X, "y": Y})], ids=["second", "by name"]
)
def test_labels_alpha_and_mask(labels, batch):
    where = {} if labels is True else {"inputs": "x"}
    loss = distill.loss_fn(model, model, KL, hard_labels=labels, alpha=0.7, **where)
    got, metrics = loss(STUDENT, batch, teacher_params=TEACHER)
    out = model(STUDENT, X)
    hard = optax.softmax_cross_entropy_with_integer_labels(out, Y).mean()
    same(got, 0.7 * KL(out, model(TEACHER, X)) + 0.3 * hard)
    same(metrics["labels"], hard)
    keep = jnp.arange(7) % 2 == 0
    masked = distill.loss_fn(
        model, model, KL, hard_labels=labels, alpha=0.7, mask=lambda batch: keep, **where
    )
    few = (X[keep], Y[keep]) if labels is True else {"x": X[keep], "y": Y[keep]}
    same(
        masked(STUDENT, batch, teacher_params=TEACHER)[0],
        loss(STUDENT, few, teacher_params=TEACHER)[0],
    )


def test_dkd_gets_the_labels():
    loss = distill.loss_fn(model, model, distill.dkd(), hard_labels=True, alpha=1.0)
    got, _ = loss(STUDENT, (X, Y), teacher_params=TEACHER)
    same(got, distill.dkd()(model(STUDENT, X), model(TEACHER, X), labels=Y))


def test_numbers_of_tunix():
    """tests/distillation/strategies/logit_test.py: batch 4, 10 classes, T = 3."""
    with jax.threefry_partitionable(False):
        s, t, y = jax.random.split(jax.random.key(0), 3)
        student, teacher = (jax.random.normal(k, (4, 10)) for k in (s, t))
        labels = jax.random.randint(y, (4,), 0, 10)
    for alpha, want in ((1.0, 0.818179), (0.5, 1.530153), (0.0, 2.242127)):
        loss = distill.loss_fn(
            lambda p, x: p, lambda x: teacher, distill.kl(3.0), hard_labels=True, alpha=alpha
        )
        np.testing.assert_allclose(loss(student, (None, labels))[0], want, rtol=1e-4)


def test_numbers_of_tunix_for_features():
    """tests/distillation/strategies/feature_projection_test.py: one example, alpha = 0.75."""
    with jax.threefry_partitionable(False):
        student, teacher = (nnx.Linear(3, n, rngs=nnx.Rngs(0)) for n in (10, 20))
        axis = np.arange(2)
        projection = nnx.LinearGeneral((1, 10), (1, 20), axis=axis, rngs=nnx.Rngs(0))
        matrix = projection.kernel[...].reshape(10, 20)
        weights = [layer.kernel[...] for layer in (student, teacher)]
    x = jnp.array([[10.0, 11.0, 12.0]])
    match = distill.match("*", "*", distill.fitnet(), output=True)
    loss = distill.loss_fn(lambda w, x: x @ w, lambda w, x: x @ w, None, match=match)
    shapes = loss.init(jax.random.key(0), weights[0], x, teacher_params=weights[1])
    projections = jax.tree.map(lambda _: matrix, shapes)
    features, _ = loss(weights[0], x, projections, teacher_params=weights[1])
    hard = optax.softmax_cross_entropy(x @ weights[0], jnp.full((1, 10), 11.0)).mean()
    np.testing.assert_allclose(0.75 * features + 0.25 * hard, 574.2112, rtol=1e-6)


def test_the_teacher_keeps_its_own_sharding():
    """Weights split over four devices, the student's on one: same numbers, nothing gathered."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("model",))

    def over(*axes):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    split = [over(None, "model"), over("model", None), over()]
    spread = [jax.device_put(w, s) for w, s in zip(TEACHER, split)]
    ours = [jax.device_put(w, over()) for w in STUDENT]
    x = jax.device_put(X, over())
    loss = distill.loss_fn(model, model, KL)
    step = jax.jit(jax.value_and_grad(lambda p, t: loss(p, x, teacher_params=t)[0]))
    want, g = value(loss, STUDENT, X, teacher_params=TEACHER)
    same(step(ours, spread), (want[0], g))
    text = step.lower(ours, spread).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_several_teachers_schedule_and_low_precision():
    other = layers(5, 3)
    loss = distill.loss_fn(
        model, (model, model), KL, teacher_weights=(0.25, 0.75), schedule=lambda i: i / 10
    )
    got, _ = loss(STUDENT, X, teacher_params=(TEACHER, other), step=4)
    out = model(STUDENT, X)
    want = 0.25 * KL(out, model(TEACHER, X)) + 0.75 * KL(out, model(other, X))
    same(got, 0.4 * want)
    low = distill.loss_fn(model, model, KL, teacher_dtype=jnp.bfloat16)
    cast = [w.astype(jnp.bfloat16) for w in TEACHER]
    said = model(cast, X.astype(jnp.bfloat16))
    np.testing.assert_allclose(low(STUDENT, X, teacher_params=TEACHER)[0], KL(out, said), rtol=0.02)


def test_the_teacher_runs_once():
    calls = []

    def teacher(x):
        jax.debug.callback(lambda _: calls.append(1), x[0, 0])
        return model(TEACHER, x)

    loss = distill.loss_fn(model, teacher, KL, match=distill.match("2", "*#2", distill.cka()))
    jax.block_until_ready(jax.jit(jax.grad(loss, has_aux=True))(STUDENT, X))
    jax.effects_barrier()
    assert len(calls) == 1


def test_features_with_learned_projections():
    fit = distill.match("re:[12]", "re:[12]", distill.fitnet(), weight=0.5)
    loss = distill.loss_fn(model, model, KL, match=fit)
    p = loss.init(jax.random.key(3), STUDENT, X, teacher_params=TEACHER)
    assert jax.tree.map(jnp.shape, p) == {"match/0": {"1->1": (6, 8), "2->2": (6, 8)}}
    f = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)
    (got, metrics), g = f(STUDENT, X, p, teacher_params=TEACHER)

    def by_hand(params, matrices):
        ours, theirs = features(params, X), features(TEACHER, X)
        pairs = zip(ours, theirs, matrices)
        found = sum(jnp.mean((a @ m - b) ** 2) for a, b, m in pairs) / 2
        return KL(model(params, X), model(TEACHER, X)) + 0.5 * found, found

    matrices = list(p["match/0"].values())
    (want, found), (gp, gm) = jax.value_and_grad(by_hand, (0, 1), has_aux=True)(STUDENT, matrices)
    same((got, metrics["match/0"], g[0], list(g[1]["match/0"].values())), (want, found, gp, gm))
    with pytest.raises(jc.JaxCompressError, match=r"widths 6 and 8 .* loss.init\(key"):
        loss(STUDENT, X, teacher_params=TEACHER)


def test_features_of_scanned_layers_and_remat():
    stacks = [draw(i, n, 4, 4) / 2 for i, n in ((0, 2), (1, 4))]

    def scanned(params, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w["w"]), None))
        return jax.lax.scan(step, x, params)[0]

    def seen(stack):
        x, out = X, []
        for w in stack:
            out.append(x)
            x = jnp.tanh(x @ w)
        return out

    map_ = distill.uniform_layers(2, 4)
    loss = distill.loss_fn(
        scanned, scanned, None, match=distill.match("w", "w", distill.rkd(), layers=map_)
    )
    student, teacher = ({"w": s} for s in stacks)
    got, g = value(jax.jit(loss), student, X, teacher_params=teacher)

    def by_hand(s):
        ours, theirs = seen(s), seen(stacks[1])
        return (distill.rkd()(ours[0], theirs[1]) + distill.rkd()(ours[1], theirs[3])) / 2

    want, gradient = jax.value_and_grad(by_hand)(stacks[0])
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    np.testing.assert_allclose(g["w"], gradient, rtol=1e-4, atol=1e-5)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(jnp.tanh(nn.Dense(6)(x)))


def frameworks():
    linen = Linen()
    yield "linen", linen.apply, linen.init(jax.random.key(0), X), "Dense_1/*"

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

        def __call__(self, x):
            return self.down(jnp.tanh(self.up(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    yield "nnx", lambda p, x: nnx.merge(graph, p)(x), state, "down/*"
    mlp = eqx.nn.MLP(4, 5, 6, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(mlp, eqx.is_array)
    yield "equinox", lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, "layers/1/*"


@pytest.mark.parametrize(
    "name, apply, params, pattern", list(frameworks()), ids=lambda x: str(x)[:8]
)
def test_frameworks(name, apply, params, pattern):
    """A student of any framework, compared with a plain teacher, without a hook in the model."""
    m = distill.match(pattern, "2", distill.similarity())
    loss = jax.jit(distill.loss_fn(apply, model, KL, match=m))
    (got, metrics), g = value(loss, params, X, teacher_params=TEACHER)
    _, seen = jc.tap(apply, pattern)(params, X)
    (hidden,) = seen.values()
    same(metrics["match/0"], distill.similarity()(hidden, features(TEACHER, X)[1]))
    same(got, KL(apply(params, X), model(TEACHER, X)) + metrics["match/0"])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(g))


@pytest.mark.parametrize("passed", [True, False], ids=["argument", "closed over"])
def test_quantize_aware_leaves_the_teacher_in_float(passed):
    teacher = model if passed else lambda x: model(TEACHER, x)
    kwargs = {"teacher_params": TEACHER} if passed else {}
    m = distill.match("2", "2" if passed else "*#2", distill.fitnet())
    loss = distill.loss_fn(model, teacher, KL, hard_labels=True, match=m)
    p = loss.init(jax.random.key(3), STUDENT, (X, Y), **kwargs)
    aware = jax.value_and_grad(jc.quantize_aware(loss, "w8a8"), argnums=(0, 2), has_aux=True)
    (got, _), g = aware(STUDENT, (X, Y), p, **kwargs)
    both = jc.quantize_aware(lambda p, x: (model(p, x), features(p, x)[1]), "w8a8")

    def by_hand(params, p):  # features are what flows to a site, before it is rounded there
        (out, hidden), theirs = both(params, X), features(TEACHER, X)[1]
        soft = KL(out, model(TEACHER, X)) + distill.fitnet()(hidden @ p, theirs)
        hard = optax.softmax_cross_entropy_with_integer_labels(out, Y).mean()
        return 0.9 * soft + 0.1 * hard

    (matrix,) = jax.tree.leaves(p)
    want, gradient = jax.value_and_grad(by_hand, (0, 1))(STUDENT, matrix)
    g = (g[0], jax.tree.leaves(g[1])[0])
    same((got, g), (want, gradient))
    assert abs(got - loss(STUDENT, (X, Y), p, **kwargs)[0]) > 1e-5


def test_stored_outputs():
    loss = distill.loss_fn(model, None, KL)
    said = model(TEACHER, X)
    want = KL(model(STUDENT, X), said)
    same(loss(STUDENT, X, teacher_outputs=said)[0], want)
    bucketed = distill.loss_fn(model, None, distill.kl())
    got = bucketed(STUDENT, X, teacher_outputs=distill.top_k(said, 2))[0]
    same(got, distill.top_k_kl(2)(model(STUDENT, X), said))


WRONG = [
    (lambda: distill.kl(temperature=0.0), "temperature=0.0; it must be positive and finite"),
    (lambda: distill.kl(temperature=-1.0), "temperature=-1.0"),
    (lambda: distill.jsd(beta=1.5), "beta=1.5; it must lie between 0 and 1"),
    (lambda: distill.loss_fn(model, model, KL, alpha=0.5), "alpha=0.5 leaves 0.5 to labels"),
    (lambda: distill.loss_fn(model, model, KL, hard_labels=True, alpha=2), "between 0 and 1"),
    (lambda: distill.loss_fn(model, model, None), "neither a loss of logits nor a match"),
    (lambda: KL(jnp.ones((2, 3)), jnp.ones((2, 4))), r"student \[2, 3\], teacher \[2, 4\]. Vocab"),
    (lambda: KL(jnp.ones((2, 3)), jnp.ones((2, 3)), mask=jnp.ones(3)), r"mask \[3\] does not fit"),
    (lambda: KL(jnp.ones((2, 3), int), jnp.ones((2, 3))), "must be an array of floating-point"),
    (lambda: distill.dkd()(jnp.ones((2, 3)), jnp.ones((2, 3))), "needs the true classes"),
    (
        lambda: distill.dkd()(jnp.ones((2, 3)), jnp.ones((2, 3)), labels=jnp.array([0, 3])),
        "label 3 is out of range: there are 3 classes",
    ),
    (lambda: distill.rkd()(jnp.ones((2, 3)), jnp.ones((3, 3))), "different numbers of examples"),
    (lambda: distill.uniform_layers(5, 4), "5 layers cannot learn from 4"),
    (
        lambda: distill.loss_fn(model, model, KL, schedule=lambda i: i)(
            STUDENT, X, teacher_params=TEACHER
        ),
        "call loss",
    ),
    (lambda: distill.loss_fn(model, None, KL)(STUDENT, X), "loss_fn has no teacher"),
    (
        lambda: distill.loss_fn(model, model, KL, hard_labels="y")(STUDENT, {"x": X}),
        r"the batch has no part 'y'; it is: \['x'\]",
    ),
]


@pytest.mark.parametrize("run, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_errors(run, message):
    with pytest.raises(jc.JaxCompressError, match=message):
        run()


@pytest.mark.parametrize(
    "match, message",
    [
        (("nothing", "2"), "'nothing' matches no site of the student. Nearest: `0`"),
        (("2", "nothing"), "'nothing' matches no site of the teacher"),
        (("*", "2"), "3 features of the student .* and 1 of the teacher"),
    ],
)
def test_errors_of_matches(match, message):
    loss = distill.loss_fn(model, model, KL, match=distill.match(*match, distill.cka()))
    with pytest.raises(jc.SiteError, match=message):
        loss(STUDENT, X, teacher_params=TEACHER)


def test_limits():
    """DKD with weights 1 and 1 - p_y is KL; T to infinity is MSE of centred logits; JSD's ends."""
    rng = np.random.default_rng(0)
    s, t = (np.float32(rng.normal(size=(1, 6))) for _ in range(2))
    y = np.array([2])
    for T in (1.0, 4.0):
        p = float(jax.nn.softmax(t / T)[0, 2])
        same(distill.dkd(1.0, 1 - p, T)(s, t, labels=y), distill.kl(T)(s, t))
    with jax.enable_x64(True):
        s, t = np.float64(s), np.float64(t)
        np.testing.assert_allclose(distill.kl(1e4)(s, t), distill.mse_logits()(s, t), rtol=1e-3)
        for beta, end in ((1e-6, distill.kl()), (1 - 1e-6, distill.reverse_kl())):
            small = min(beta, 1 - beta)
            np.testing.assert_allclose(distill.jsd(beta)(s, t) / small, end(s, t), rtol=1e-4)


def test_crd_leaves_out_its_own_class():
    rng = np.random.default_rng(0)
    s, t = (np.float32(rng.normal(size=(4, 3))) for _ in range(2))
    y = np.array([0, 0, 1, 2])
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    total = 0
    for i in range(4):
        e = {j: np.exp(a[i] @ b[j]) for j in range(4) if j == i or y[i] != y[j]}
        total -= np.log(e[i] / sum(e.values())) / 4
    np.testing.assert_allclose(distill.crd(1.0)(s, t, labels=y), total, rtol=1e-5)
