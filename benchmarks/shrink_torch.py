# SPDX-License-Identifier: Apache-2.0
"""Torch-Pruning on the conv net of `shrink_study.py`: the same groups, and the same fine-tuning.

The net is trained here, its weights are copied to torch, where Torch-Pruning removes channels by
its group norm (`GroupMagnitudeImportance`) down to the widths that `jc.prune.shrink` chose for a
quarter of the FLOPs. What it leaves comes back and is trained on with the same images in the same
order. Its published cases (ResNet-50 on ImageNet and larger) are out of reach of this machine.
Finished seeds are lines of `benchmarks/logs/shrink_torch.jsonl` and are not run again.

Usage: python benchmarks/shrink_torch.py [seeds]      (needs torch, torch-pruning, Fashion-MNIST)

https://github.com/VainF/Torch-Pruning
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import shrink_study as study
import torch
import torch_pruning as tp
from study import finished, print_differences

import jaxcompress as jc

LOG = Path(__file__).parent / "logs" / "shrink_torch.jsonl"
CONFIGS = {
    "original": "original",
    "torch-pruning": "Torch-Pruning",
    "ours": "ours, L2",
    "repaired": "ours, L2, repair",
}
COMPARISONS = (("ours", "torch-pruning", "not worse"), ("repaired", "torch-pruning", "not worse"))


class Net(torch.nn.Module):
    """`shrink_study.model`, channels first."""

    def __init__(self, params):
        super().__init__()
        convs = []
        for i in range(4):
            w, b = (np.asarray(params[f"conv{i}"][k]) for k in "wb")
            conv = torch.nn.Conv2d(w.shape[2], w.shape[3], 3, 1 if i == 2 else 2)
            conv.weight.data = torch.tensor(w.transpose(3, 2, 0, 1))
            conv.bias.data = torch.tensor(b.ravel())
            convs.append(conv)
        self.convs = torch.nn.ModuleList(convs)
        w, b = (np.asarray(params["dense"][k]) for k in "wb")
        self.dense = torch.nn.Linear(*w.shape)
        self.dense.weight.data, self.dense.bias.data = torch.tensor(w.T), torch.tensor(b.ravel())

    def forward(self, x):
        for conv in self.convs:
            side = x.shape[-1]
            stride = conv.stride[0]
            total = max(0, (-(-side // stride) - 1) * stride + 3 - side)  # "SAME"
            low, high = total // 2, total - total // 2
            x = torch.relu(conv(torch.nn.functional.pad(x, (low, high, low, high))))
        return self.dense(x.mean((2, 3)))

    def params(self):
        """In the layout of JAX."""
        out = {}
        for i, conv in enumerate(self.convs):
            w = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
            out[f"conv{i}"] = {"w": w, "b": conv.bias.detach().numpy().reshape(1, 1, 1, -1)}
        w, b = self.dense.weight.detach().numpy().T, self.dense.bias.detach().numpy()[None]
        return jax.tree.map(jnp.asarray, out | {"dense": {"w": w, "b": b}})


def groups_of_torch(net, x):
    """Sets of `name:axis` in our layout, of the weights and biases that Torch-Pruning couples."""
    names = {conv: f"conv{i}" for i, conv in enumerate(net.convs)} | {net.dense: "dense"}
    graph, out = tp.DependencyGraph().build_dependency(net, x), set()
    for group in graph.get_all_groups(root_module_types=[torch.nn.Conv2d, torch.nn.Linear]):
        members = set()
        for item in group:
            dep = item.dep
            module, name = dep.target.module, names.get(dep.target.module)
            if name is None:
                continue
            rank = 4 if module in net.convs else 2
            if "out" in dep.handler.__name__:
                members |= {f"{name}/w:{rank - 1}", f"{name}/b:{rank - 1}"}
            else:
                members.add(f"{name}/w:{rank - 2}")
        out.add(frozenset(members))
    return out


def groups_of_ours(params, x):
    found = jc.prune.groups(study.model)(params, x)
    return {
        frozenset(str(m) for m in group.members): group.pinned for group in found if group.size > 1
    }


def of_torch(params, widths):
    """The parameters that Torch-Pruning leaves."""
    net, x = Net(params), torch.zeros(1, 1, 28, 28)
    ratios = {conv: 1 - n / conv.out_channels for conv, n in zip(net.convs, widths, strict=True)}
    pruner = tp.pruner.MetaPruner(
        net,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio_dict=ratios,
        ignored_layers=[net.dense],
    )
    pruner.step()
    return net.params()


def run(seed, train, test):
    original = study.fit(
        study.model, study.init(jax.random.key(seed)), train, study.EPOCHS, study.RATE, seed,
        lambda: None,
    )  # fmt: skip
    x = train[0][:1]
    with torch.no_grad():
        ours, theirs = (
            study.model(original, x),
            Net(original)(torch.tensor(np.asarray(x)).reshape(1, 1, 28, 28)),
        )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    mine, other = (
        groups_of_ours(original, x),
        groups_of_torch(Net(original), torch.zeros(1, 1, 28, 28)),
    )
    free = {members for members, pinned in mine.items() if not pinned}
    classes = {members for members in other if "dense/w:1" in members}  # an output: pinned here
    small = study.shrunk("l2-plain", original, train)
    widths = [small.params[f"conv{i}"]["w"].shape[-1] for i in range(4)]
    starts = {
        "torch-pruning": (study.model, of_torch(original, widths)),
        "ours": (small.fn, small.params),
        "repaired": study.shrunk("l2", original, train)[:2],
    }
    shapes = {k: jax.tree.map(jnp.shape, p) for k, (_, p) in starts.items()}
    assert shapes["torch-pruning"] == shapes["ours"] == shapes["repaired"], shapes
    rows = [{"config": "original", "accuracy": study.accuracy(study.model, original, test)}]
    for config, (fn, params) in starts.items():
        before = study.accuracy(fn, params, test)
        params = study.fit(fn, params, train, study.TUNE, study.RATE, seed, lambda: None)
        after = study.accuracy(fn, params, test)
        rows.append({"config": config, "accuracy": after, "before_tuning": before})
    extra = {
        "seed": seed,
        "widths": widths,
        "same_groups": free | classes == other,
        "groups": len(free),
    }
    return [row | extra for row in rows]


def main(seeds):
    done = {row["seed"] for row in finished(LOG)}
    images, labels = study.read("train")
    train = jax.tree.map(jnp.asarray, (images[: study.TRAIN], labels[: study.TRAIN]))
    test = jax.tree.map(jnp.asarray, study.read("t10k"))
    for seed in set(range(seeds)) - done:
        rows = run(seed, train, test)
        with LOG.open("a") as log:
            for row in rows:
                print(json.dumps(row), file=log)
                print(row, flush=True)
    rows = finished(LOG)
    of = {c: {r["seed"]: r for r in rows if r["config"] == c} for c in CONFIGS}
    same = all(r["same_groups"] for r in rows)
    print(f"Torch-Pruning {tp.__version__}; {rows[0]['groups']} groups, the same in both: {same}")
    for config, title in CONFIGS.items():
        found = of[config].values()
        after = np.mean([r["accuracy"] for r in found])
        before = np.mean([r.get("before_tuning", np.nan) for r in found])
        print(f"{title:<20}{after:>8.2f}{before:>9.2f} before tuning")
    print_differences(of, CONFIGS, COMPARISONS, 40)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
