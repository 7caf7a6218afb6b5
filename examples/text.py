# SPDX-License-Identifier: Apache-2.0
"""A transformer that writes Python, in plain JAX, trained int8-aware.

    jaxcompress compress examples/text.py --recipe w8a8

A decoder over bytes of the sources of Python's standard library: every tenth file is test data.
The layers are stacked and scanned over. `accuracy` is the share of next bytes that the model
thinks most likely, `bits_per_byte` its cross-entropy on the same bytes.

References: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3
(with root mean square norms and without biases).
"""

import functools
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc

WIDTH, LAYERS, HEADS, LENGTH = 128, 4, 4, 128
BATCH, FLOAT_STEPS, STEPS, TEST_ROWS = 16, 600, 200, 256


def load():
    """(training bytes, test bytes) as uint8, of the modules outside of packages."""
    paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not paths:
        raise FileNotFoundError("the sources of Python's standard library are not installed.")
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    test = [text for i, text in enumerate(texts) if i % 10 == 9]
    return np.concatenate([t for i, t in enumerate(texts) if i % 10 != 9]), np.concatenate(test)


def init(key):
    """Parameters; those of the layers are stacked."""
    shapes = dict.fromkeys(("q", "k", "v", "o"), (LAYERS, WIDTH, WIDTH))
    shapes |= {"up": (LAYERS, WIDTH, 4 * WIDTH), "down": (LAYERS, 4 * WIDTH, WIDTH)}
    shapes |= {"bytes": (256, WIDTH), "places": (LENGTH, WIDTH), "head": (WIDTH, 256)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {n: jax.random.normal(keys[n], s) * s[-2] ** -0.5 for n, s in shapes.items()}
    params["bytes"], params["places"] = (
        jax.random.normal(keys[n], shapes[n]) * 0.02 for n in ("bytes", "places")
    )
    norms = {n: jnp.ones((LAYERS, 1, 1, WIDTH)) for n in ("norm1", "norm2")}
    return params | norms | {"norm": jnp.ones((1, 1, WIDTH))}


def norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def layer(x, p):
    h = norm(x, p["norm1"])
    q, k, v = ((h @ p[n]).reshape(*x.shape[:2], HEADS, -1) for n in ("q", "k", "v"))
    scores = jnp.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    past = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -1e9))
    x = x + jnp.einsum("bhij,bjhd->bihd", weights, v).reshape(x.shape) @ p["o"]
    return x + jax.nn.gelu(norm(x, p["norm2"]) @ p["up"]) @ p["down"], None


def apply(params, ids):
    """Logits float32[batch, length, 256] of the bytes after each of uint8[batch, length]."""
    x = params["bytes"][ids] + params["places"][None, : ids.shape[1]]
    stacked = ("q", "k", "v", "o", "up", "down", "norm1", "norm2")
    x, _ = jax.lax.scan(layer, x, {n: params[n] for n in stacked})
    return norm(x, params["norm"]) @ params["head"]


def loss(params, rows):
    """Mean cross-entropy of the next byte, in nats."""
    logits = apply(params, rows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def batches(rng):
    """Rows from random places."""
    for _ in range(100):
        starts = rng.integers(0, len(train) - LENGTH - 1, BATCH)
        yield np.stack([train[i : i + LENGTH + 1] for i in starts])


def evaluate(predict):
    right, nats = 0, 0.0
    for i in range(0, TEST_ROWS, BATCH):
        rows = test_rows[i : i + BATCH]
        logits = predict(rows[:, :-1])
        right += int(jnp.sum(jnp.argmax(logits, -1) == rows[:, 1:]))
        nats += float(optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).sum())
    count = TEST_ROWS * LENGTH
    return {"accuracy": right / count, "bits_per_byte": nats / count / np.log(2)}


train, test = load()
places = np.linspace(0, len(test) - LENGTH - 1, TEST_ROWS).astype(int)
test_rows = np.stack([test[i : i + LENGTH + 1] for i in places])
schedule = functools.partial(optax.warmup_cosine_decay_schedule, 0.0)

task = jc.Task(
    "text",
    apply,
    init,
    calibration=[train[: BATCH * LENGTH].reshape(BATCH, LENGTH)],
    evaluate=evaluate,
    train=jc.Train(
        loss,
        batches,
        optimizer=optax.adam(1e-4),
        steps=STEPS,
        float_steps=FLOAT_STEPS,
        float_optimizer=optax.adam(schedule(2e-3, 100, FLOAT_STEPS)),
    ),
)
