# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder without a quarter of its heads and hidden units, or without a layer.

    python examples/shrink_minilm.py

The model, its calibration texts and its documents are those of `minilm.py`, which also says how
to get them. Every layer of the scan keeps its own heads and units; all keep the same number. Repair
sees the 128 background texts; in the last rows also paragraphs of Wikipedia, which come with gensim
too, on which the small model then learns the embeddings of the original. Neither sees the
documents.
"""

import bz2
import functools
import html
import re

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax

import jaxcompress as jc

HEADS, UNITS, LAYERS = "layers/out/w:2[0::32]", "layers/down/w:2", "layers/down/w:0"
BOTH = {HEADS: 9, UNITS: 1152}
ROWS = {  # what is kept, the importance, the repair
    "3/4 of heads and units": (BOTH, "wanda", None),
    "and biases": (BOTH, "wanda", "bias"),
    "and least squares": (BOTH, "wanda", "least_squares"),
    "the same, obs": (BOTH, "obs", "least_squares"),
    "3/4 of units, obs": ({UNITS: 1152}, "obs", "least_squares"),
    "3/4 of heads, obs": ({HEADS: 9}, "obs", "least_squares"),
    "5 of 6 layers": ({LAYERS: 5}, "wanda", None),
}
DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TEXTS, TOKENS, STEPS, BATCH, RATE = 2000, 96, 1200, 16, 1e-4


def paragraphs():
    """The longer paragraphs of some articles of Wikipedia, without the markup, in random order."""
    with bz2.open(minilm.data / DUMP, "rt") as file:
        articles = re.findall(r"<text[^>]*>(.*?)</text>", file.read(), re.S)
    out = []
    for text in articles:
        text = html.unescape(text)
        for _ in range(4):  # templates and tables in one another
            text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->", "", text, flags=re.S)
        text = re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text)
        text = re.sub(r"<[^>]+>|'{2,}|\[http\S* ?|\]", "", text)
        lines = (line.strip() for line in text.split("\n"))
        out += [line for line in lines if len(line) > 300 and line[0] not in "*|=#:;{!"]
    return [out[i] for i in np.random.default_rng(0).permutation(len(out))]


def more_texts():
    """int32[2, n, TOKENS]: the background texts and paragraphs of Wikipedia, cut to one length."""
    background = (minilm.data / "lee_background.cor").read_text("utf-8").strip().split("\n")
    minilm.tokenizer.enable_truncation(TOKENS)
    x = minilm.encode(background + paragraphs())
    minilm.tokenizer.enable_truncation(256)
    return x


def distilled(small, x):
    """The parameters of a small model that learned the embeddings of the original."""
    loss = jc.distill.loss_fn(small.fn, minilm.apply, jc.distill.cosine(), inputs=lambda x: x)
    tx = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    @jax.jit
    def step(params, opt, x):
        _, g = jax.value_and_grad(loss, has_aux=True)(params, x, teacher_params=minilm.params)
        updates, opt = tx.update(g, opt)
        return optax.apply_updates(params, updates), opt

    params, opt, rng = small.params, tx.init(small.params), np.random.default_rng(0)
    for _ in range(STEPS):
        rows = rng.choice(x.shape[1], BATCH, replace=False)
        params, opt = step(params, opt, jnp.asarray(x[:, rows]))
    return params


def show(name, small):
    found = minilm.evaluate(functools.partial(jax.jit(small.fn), small.params))
    before, after = small.report.flops if small.report else (1, 1)
    print(
        f"{name:<28}{found['pearson']:>9.4f}{found['cosine']:>9.4f}"
        f"{after / before:>8.2f}{jc.nbytes(small.params):>14,}",
        flush=True,
    )


def main(rows=ROWS):
    print(f"{'kept':<28}{'pearson':>9}{'cosine':>9}{'flops':>8}{'parameters':>14}")
    show("everything", jc.Compressed(minilm.apply, minilm.params, None))
    shrink = functools.partial(
        jc.prune.shrink, minilm.apply, minilm.params, minilm.batches[0], calibration=minilm.batches
    )
    for name, (keep, importance, repair) in rows.items():
        show(name, shrink(keep=keep, importance=importance, repair=repair))
    x = more_texts()
    whole = x[:, x[1].all(1)][:, :TEXTS]
    batches = np.split(whole, range(BATCH, whole.shape[1], BATCH), axis=1)
    small = shrink(keep=BOTH, importance="obs", repair="least_squares", calibration=batches)
    show("obs, with more texts", small)
    show(f"and {STEPS} steps of distillation", small._replace(params=distilled(small, x)))


if __name__ == "__main__":
    main()
