# SPDX-License-Identifier: Apache-2.0
"""The loops of published torch code, weights [out, in], as baselines of speed and of quality.

https://github.com/IST-DASLab/gptq, https://github.com/IST-DASLab/sparsegpt,
https://github.com/locuslab/wanda, https://github.com/mit-han-lab/llm-awq
"""

import numpy as np
import torch

BLOCK = 128


class Hessian:
    """`add_batch` of `gptq.py` of IST-DASLab/gptq, for sequences [n, tokens, in]."""

    def __init__(self, n):
        self.h, self.samples = torch.zeros(n, n), 0

    def add(self, x):
        n = x.shape[0]
        x = x.reshape(-1, x.shape[-1]).t()
        self.h *= self.samples / (self.samples + n)
        self.samples += n
        x = np.sqrt(2 / self.samples) * x.float()
        self.h += x.matmul(x.t())
        return self.h


class Quantizer:
    """Absmax to -top ... top, for each row."""

    def __init__(self, top=7):
        self.top = top

    def find(self, w):
        self.scale = w.abs().amax(1, keepdim=True) / self.top

    def __call__(self, w):
        return torch.clamp(torch.round(w / self.scale), -self.top, self.top) * self.scale


def factor(hessian):
    h, n = hessian.clone(), len(hessian)
    h[range(n), range(n)] += 0.01 * torch.mean(torch.diag(h))
    h = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(h, upper=True)


def gptq(w, hessian, group=None, top=7):
    """`gptq.py` of IST-DASLab/gptq: (rounded weights, scales [out, groups])."""
    w, u, quantizer = w.clone(), factor(hessian), Quantizer(top)
    quantizer.find(w)
    n, scales = w.shape[1], []
    losses, q = torch.zeros_like(w), torch.zeros_like(w)
    for i1 in range(0, n, BLOCK):
        i2 = min(i1 + BLOCK, n)
        w1 = w[:, i1:i2].clone()
        q1, errors, loss1 = (torch.zeros_like(w1) for _ in range(3))
        u1 = u[i1:i2, i1:i2]
        for i in range(i2 - i1):
            column, d = w1[:, i], u1[i, i]
            if group and (i1 + i) % group == 0:
                quantizer.find(w[:, i1 + i : i1 + i + group])
                scales.append(quantizer.scale)
            q_ = quantizer(column.unsqueeze(1)).flatten()
            q1[:, i] = q_
            loss1[:, i] = (column - q_) ** 2 / d**2
            error = (column - q_) / d
            w1[:, i:] -= error.unsqueeze(1).matmul(u1[i, i:].unsqueeze(0))
            errors[:, i] = error
        q[:, i1:i2], losses[:, i1:i2] = q1, loss1 / 2
        w[:, i2:] -= errors.matmul(u[i1:i2, i2:])
    return q, torch.cat(scales or [quantizer.scale], 1)


def sparsegpt(w, hessian, n=2, m=4):
    """`sparsegpt.py` of IST-DASLab/sparsegpt."""
    w, u = w.clone(), factor(hessian)
    losses = torch.zeros(len(w))
    for i1 in range(0, w.shape[1], BLOCK):
        i2 = min(i1 + BLOCK, w.shape[1])
        w1 = w[:, i1:i2].clone()
        q1, errors, loss1 = (torch.zeros_like(w1) for _ in range(3))
        u1 = u[i1:i2, i1:i2]
        mask = torch.zeros_like(w1) == 1
        for i in range(i2 - i1):
            column, d = w1[:, i], u1[i, i]
            if i % m == 0:
                scores = w1[:, i : i + m] ** 2 / (torch.diag(u1)[i : i + m].reshape((1, -1))) ** 2
                mask.scatter_(1, i + torch.topk(scores, n, dim=1, largest=False)[1], True)
            q = column.clone()
            q[mask[:, i]] = 0
            q1[:, i] = q
            loss1[:, i] = (column - q) ** 2 / d**2
            error = (column - q) / d
            w1[:, i:] -= error.unsqueeze(1).matmul(u1[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, i1:i2] = q1
        losses += torch.sum(loss1, 1) / 2
        w[:, i2:] -= errors.matmul(u[i1:i2, i2:])
    return w


def wanda(w, norm, nm=None):
    """`prune.py` of locuslab/wanda."""
    scores = torch.abs(w) * norm.reshape((1, -1))
    mask = torch.zeros_like(scores) == 1
    if nm:
        for i in range(0, w.shape[1], nm[1]):
            part = scores[:, i : i + nm[1]].float()
            mask.scatter_(1, i + torch.topk(part, nm[0], dim=1, largest=False)[1], True)
    else:
        order = torch.sort(scores, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : w.shape[1] // 2], True)
    return ~mask


def awq(w, x, group):
    """`auto_scale.py` of llm-awq, for one linear layer."""
    wanted, magnitude = x @ w.T, x.abs().mean(0)
    losses = []
    for ratio in range(20):
        s = magnitude.pow(ratio / 20).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        scaled = (w * s).reshape(-1, group)
        quantizer = Quantizer()
        quantizer.find(scaled)
        out = x @ (quantizer(scaled).reshape(w.shape) / s).T
        losses.append((wanted - out).float().pow(2).mean().item())
    return int(np.argmin(losses))
