# SPDX-License-Identifier: Apache-2.0
"""A pretrained sentence encoder pruned without training: magnitude, Wanda, SparseGPT, with int4.

    python examples/prune_minilm.py

MiniLM, its data and its measures are those of `examples/minilm.py`; calibrated on the background
texts alone. The linear layers are pruned; embedding tables stay.

References: Sun et al. 2023 (Wanda); Frantar and Alistarh 2023 (SparseGPT); Yin et al. 2024 (OWL).
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from jaxcompress import prune


def load_minilm():
    path = pathlib.Path(__file__).with_name("minilm.py")
    spec = importlib.util.spec_from_file_location("minilm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ("query", "key", "value", "out", "up", "down")
LINEAR = [f"layers/{name}/w" for name in NAMES]
INT4 = jc.Recipe(
    [jc.Rule("*", "int8", op="gather"), jc.Rule("*", jc.Quantizer("int4", "group:32"))], "w4-g32"
)
HALF, TWO_OF_FOUR = {"sparsity": 0.5}, {"nm": (2, 4)}


def magnitude(params, settings):
    """As many by absolute value: half of each layer, or 2 of every 4 inputs."""
    if "nm" in settings:
        pruner = prune.nm(*settings["nm"], axis=-1, pattern=LINEAR)
    else:
        pruner = prune.magnitude(settings["sparsity"], pattern=LINEAR, per_layer=LINEAR)
    tx = optax.chain(optax.sgd(0.0), pruner)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return optax.apply_updates(params, updates)


def rows(net, batches, params):
    """(what was done, function, parameters)."""
    for amount, label in ((HALF, "50 %"), (TWO_OF_FOUR, "2:4")):
        yield f"{label} magnitude", net, magnitude(params, amount)
        for name in ("wanda", "sparsegpt"):
            small = getattr(prune, name)(net, params, batches, pattern=LINEAR, **amount)
            yield f"{label} {name}", net, small.params
            if name == "sparsegpt" and label == "2:4":
                pruned = small.params
    owl = prune.sparsegpt(net, params, batches, pattern=LINEAR, profile=prune.owl(), sparsity=0.5)
    yield "50 % sparsegpt, OWL", net, owl.params
    joint = jc.methods.sparsegpt(nm=(2, 4))
    for label, start, method in (
        ("2:4 and int4, jointly", params, joint),
        ("2:4, then int4 to nearest", pruned, "rtn"),
        ("2:4, then int4 by GPTQ", pruned, jc.methods.gptq(keep_zeros=True)),
    ):
        small = jc.quantize(net, start, INT4, calibration=batches, method=method)
        yield label, small.fn, small.params


def main():
    minilm = load_minilm()
    print(f"{'':26} pearson   cosine   zeros in linear layers")
    for name, fn, params in rows(minilm.apply, minilm.batches, minilm.params):
        found = minilm.evaluate(functools.partial(jax.jit(fn), params))
        dense = [_dense(params["layers"][k]["w"]) for k in NAMES]
        zeros = sum(int(jnp.sum(w == 0)) for w in dense) / sum(w.size for w in dense)
        print(
            f"{name:26} {found['pearson']:7.4f}  {found['cosine']:7.4f}  {zeros:7.1%}", flush=True
        )


def _dense(w):
    return w.dequantize() if isinstance(w, jc.QTensor) else w


if __name__ == "__main__":
    main()
