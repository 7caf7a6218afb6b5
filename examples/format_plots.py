# SPDX-License-Identifier: Apache-2.0
"""Plots of the grids of small formats and of error against bits. `python format_plots.py [DIR]`"""

import pathlib
import sys

import jax
import jax.numpy as jnp

import jaxcompress as jc

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("format_plots.py draws with matplotlib: pip install matplotlib")

GRIDS = ("int4", "uint4", "nf4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "ternary")
FORMATS = (
    "ternary", "int2", "int3", "int4", "int5", "int6", "int8", "nf4", "mxfp4", "nvfp4",
    "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8",
)  # fmt: skip


def data():
    key = jax.random.key(0)
    normal = jax.random.normal(key, (512, 256))
    outliers = jnp.where(jax.random.uniform(key, normal.shape) < 0.002, 20 * normal, normal)
    return {"normal": normal, "Laplace": jax.random.laplace(key, normal.shape),
            "outliers": outliers}  # fmt: skip


def quantizer(name):
    fmt = jc.formats.get(name)
    return jc.Quantizer(name) if fmt.block else jc.Quantizer(name, "group:32")


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    fig, axis = plt.subplots(figsize=(7, 3))
    for row, name in enumerate(GRIDS):
        values = jc.formats.get(name).values()
        axis.plot(values / abs(values).max(), [-row] * len(values), "|", markersize=12)
    axis.set_yticks([-i for i in range(len(GRIDS))], GRIDS)
    axis.set_xlabel("value / largest value")
    fig.tight_layout()
    fig.savefig(folder / "grids.png", dpi=80)

    fig, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True)
    print(f"{'format':12}{'bits':>7}" + "".join(f"{name:>12}" for name in data()))
    for name in FORMATS:
        q, errors, bits = quantizer(name), [], 0.0
        for axis, (title, x) in zip(axes, data().items(), strict=True):
            noise = jnp.mean((q.fake_quantize(x, 1) - x) ** 2) / jnp.mean(x**2)
            errors.append(float(10 * jnp.log10(noise)))
            bits = 8 * q.nbytes(x.shape, 1) / x.size
            axis.plot(bits, errors[-1], ".")
            axis.annotate(name, (bits, errors[-1]), fontsize=7)
            axis.set(title=title, xlabel="bits per value, scales included")
        print(f"{name:12}{bits:7.2f}" + "".join(f"{e:12.1f}" for e in errors))
    axes[0].set_ylabel("noise / signal, dB")
    fig.tight_layout()
    fig.savefig(folder / "error.png", dpi=80)


if __name__ == "__main__":
    main()
