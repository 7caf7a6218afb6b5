# SPDX-License-Identifier: Apache-2.0
"""The mean error of the outputs goes into the bias."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..._calibration.rows import rows_of
from ..._calibration.stream import same_inputs
from ..._core.biases import biases_of
from ..._core.qtensor import QTensor
from ..._solvers.bias import bias_correction as solve
from ..weights import weights_of
from ._method import Method


def bias_correction() -> Method:
    """Bias correction: outputs keep the mean that they have over the calibration tokens.

        b += (W - W_q) E[x]

    E[x] is that of the float function. The bias is the parameter that is added to the result of the
    site; a site without one is named in the report. After whatever rounds:
    `["gptq", "bias_correction"]`.

    >>> bias_correction().name
    'bias_correction'

    References: Nagel et al. 2019, Data-Free Quantization, section 4.2, equation 15, with measured
    means.
    """
    return Method("bias_correction", correct=_correct)


def _correct(job: Any, packed: Mapping[str, QTensor]) -> Any:
    traced, parameters = job.trace(), job.parameters()
    known, _ = weights_of(traced, parameters)
    biases = biases_of(traced, *job.call)
    shared = collections.Counter(bias.path for bias in biases.values())
    same = same_inputs(traced.plan)
    chosen = {}
    for path, weight in known.items():
        site, i = weight.uses[0]
        rows, bias = rows_of(site, i), biases.get(site.name)
        if path not in packed or rows is None or len(weight.uses) > 1:
            continue
        if bias is None or shared[bias.path] > 1:
            job.notes[path] = "no bias to correct"
        else:
            chosen[path] = (weight, rows, bias, site.name)
    if not chosen:
        return job
    wanted = {same.get(name, name): ("mean",) for *_, name in chosen.values()}
    seen = job.collect(wanted, "bias_correction")
    new = {}
    for path, (weight, rows, bias, name) in chosen.items():
        read = rows.of
        for _ in weight.stack:
            read = jax.vmap(read)
        w, w_q = (
            read(weight.read(x)[0].astype(jnp.float32))
            for x in (parameters[path], packed[path].dequantize())
        )
        shift = solve(w, w_q, seen[same.get(name, name)]["mean"])
        shift = shift.reshape(*weight.stack, -1)  # the groups of a convolution side by side
        b = parameters[bias.path]
        new[bias.path] = (b + shift[..., bias.channel].reshape(b.shape)).astype(b.dtype)
    return dataclasses.replace(job, params=job.with_parameters(new))
