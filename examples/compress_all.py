# SPDX-License-Identifier: Apache-2.0
"""Everything in one train step: distillation from the float model, 2:4 sparsity, int4 weights.

    python examples/compress_all.py

Fashion-MNIST, a network of three dense layers. Each part is one line around the step that was there
before: `jc.distill.loss_fn` around the forward pass, `jc.prune.nm` as the last link of the
optimizer, `jc.quantize_aware` around the whole step. The files are those of Debian's package
`dataset-fashion-mnist`; the variable FMNIST_DIR says where else they lie.

References: Hinton et al. 2015; Mishra et al. 2021; Jacob et al. 2018.
"""

import gzip
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc

BATCH, STEPS = 100, 2000
SIZES = (784, 128, 128, 10)
INT4 = jc.Recipe([jc.Rule("*", "int4")], "int4 per channel")


def read(part):
    """Images of mean 0 and variance 1, float32[n, 784], and labels, int32[n]."""
    folder = pathlib.Path(os.environ.get("FMNIST_DIR", "/usr/share/datasets/fashion-mnist"))
    paths = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}. Get it with `apt-get install "
            "dataset-fashion-mnist`, or set FMNIST_DIR to a folder with its four .gz files."
        )
    images, labels = (np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8) for path in paths)
    return (images[16:].reshape(-1, 784) / np.float32(255) - 0.286) / 0.353, labels[8:].astype(
        "int32"
    )


def init(key):
    keys, pairs = jax.random.split(key, 3), zip(SIZES, SIZES[1:])
    return [
        {"w": (2 / a) ** 0.5 * jax.random.normal(k, (a, b)), "b": jnp.zeros((1, b))}
        for k, (a, b) in zip(keys, pairs)
    ]


def model(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def labels_alone(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(params, x), y).mean(), {}


def make_step(loss, tx):
    def step(params, opt, batch):
        _, grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    return step


def run(step, params, opt, data):
    step = jax.jit(step)
    order = np.random.default_rng(0)
    for _ in range(STEPS):
        rows = order.integers(0, len(data[0]), BATCH)
        params, opt = step(params, opt, (data[0][rows], data[1][rows]))
    return params, opt


def stored(params, masks, quantize):
    """Bytes of the parameters without their zeros, of int4 where asked."""
    if masks is None:
        return jc.nbytes(quantize(params))
    one = lambda w: jc.Quantizer("int4").quantize(w, axis=0)  # noqa: E731
    values = None if quantize is keep else one
    return jc.nbytes(jc.prune.sparse(params, masks, pattern=(2, 4), quantize=values))


def keep(params):
    return params


def int4(params):
    return jc.quantize(model, params, INT4, example_inputs=jnp.ones((1, 784))).params


def main():
    train, test = read("train"), read("t10k")
    train = train[0][:20000], train[1][:20000]
    adam = lambda rate: optax.adam(optax.cosine_decay_schedule(rate, STEPS))  # noqa: E731
    tx = adam(1e-3)
    start = init(jax.random.key(0))
    teacher, _ = run(make_step(labels_alone, tx), start, tx.init(start), train)

    pruner = jc.prune.nm(2, 4, pattern="*/w")
    once = optax.chain(optax.sgd(0.0), pruner)
    zeros = jax.tree.map(jnp.zeros_like, teacher)
    updates, opt = once.update(zeros, once.init(teacher), teacher)
    masks, pruned = jc.prune.masks(opt), optax.apply_updates(teacher, updates)
    aware = jc.quantize_aware(model, INT4)

    kl = jc.distill.kl(temperature=4.0)
    distilled = jc.distill.loss_fn(model, lambda x: model(teacher, x), kl, hard_labels=True)
    tx = optax.chain(adam(1e-3), pruner)  # 2:4, and it stays

    def tuned(loss, transform=lambda step: step):
        return run(transform(make_step(loss, tx)), pruned, tx.init(pruned), train)[0]

    everything = lambda step: jc.quantize_aware(step, INT4)  # noqa: E731
    rows = {
        "float32": (model, teacher, None, keep),
        "2:4": (model, pruned, masks, keep),
        "int4": (aware, teacher, None, int4),
        "2:4, int4": (aware, pruned, masks, int4),
        "2:4, trained": (model, tuned(labels_alone), masks, keep),
        "2:4, int4, trained": (aware, tuned(labels_alone, everything), masks, int4),
        "2:4, int4, distilled": (aware, tuned(distilled, everything), masks, int4),
    }
    print(f"{'weights':<22}{'bytes':>9}{'test accuracy':>15}{'agreement':>11}")
    best = model(teacher, test[0]).argmax(-1)
    for name, (fn, params, kept, quantize) in rows.items():
        found = jax.jit(fn)(params, test[0]).argmax(-1)
        right, same = 100 * float((found == test[1]).mean()), 100 * float((found == best).mean())
        size = stored(params, None if kept is None else jax.tree.map(_mask, params, kept), quantize)
        print(f"{name:<22}{size:>9,}{right:>14.2f}%{same:>10.2f}%", flush=True)


def _mask(x, mask):
    """Where a weight is now: masks of the optimizer may have moved while it trained."""
    return x != 0 if jnp.ndim(mask) else mask


if __name__ == "__main__":
    main()
