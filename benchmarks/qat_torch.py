# SPDX-License-Identifier: Apache-2.0
"""The train steps of `qat.py` in torch: torchao's quantization-aware training over float32.

The MLP and the transformer of `qat.py`, the same sizes, plain SGD, eager as torchao's recipes run
it; int8 per channel, and per token with zero points, as it has no others. Ratios to torch's own
float32 step, candidates in turns.

    pip install torch torchao
    python benchmarks/qat_torch.py [--rounds 7] [--out FILE]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
import torchao
from harness import machine, pin, spread
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.qkvo = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        h = F.layer_norm(x, x.shape[-1:])
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in self.qkvo[:3])
        a = F.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        x = x + self.qkvo[3]((a @ v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


def cases():
    """(name, function that makes a model, inputs, labels)."""
    torch.manual_seed(0)
    sizes = (784, 1024, 1024, 10)

    def mlp():
        layers = [nn.Linear(i, o, bias=False) for i, o in zip(sizes, sizes[1:])]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    yield "mlp", mlp, torch.randn(256, 784), torch.randint(0, 10, (256,))

    def transformer():
        blocks = [Block(256, 4) for _ in range(4)]
        return nn.Sequential(nn.Embedding(256, 256), *blocks, nn.Linear(256, 256, bias=False))

    ids = torch.randint(0, 256, (16, 129))
    yield "transformer", transformer, ids[:, :-1], ids[:, 1:]


def step_of(model, x, y):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="append a table in Markdown to this file")
    args = parser.parse_args()
    pin()
    torch.set_num_threads(1)
    about = f"{machine()}; torch {torch.__version__}, torchao {torchao.__version__}"
    print(about)
    lines = ["", "## Train step of torchao over torch's float32", "", f"{about}.", ""]
    lines += ["| model | step | spread |", "|---|---|---|"]
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
    config = QATConfig(activation_config=activation, weight_config=weight, step="prepare")
    for name, make, x, y in cases():
        plain, aware = make(), make()
        aware.load_state_dict(plain.state_dict())
        quantize_(aware, config)
        steps = [step_of(model, x, y) for model in (plain, aware)]
        first = [step() for step in steps]
        assert first[0] != first[1] and abs(first[0] - first[1]) < 0.05 * first[0], first
        assert all(float(p.grad.abs().max()) > 0 for p in aware.parameters())
        times = ([], [])
        for turn in range(args.rounds):
            for i in (0, 1) if turn % 2 else (1, 0):
                start = time.process_time()
                steps[i]()
                times[i].append(time.process_time() - start)
        base, found = (sorted(t)[len(t) // 2] for t in times)
        print(f"{name:14}{found / base:8.2f}{spread(times[1]):8.2f}", flush=True)
        lines.append(f"| {name} | {found / base:.2f} | {spread(times[1]):.2f} |")
    if args.out:
        with args.out.open("a") as f:
            print("\n".join(lines), file=f)


if __name__ == "__main__":
    main()
