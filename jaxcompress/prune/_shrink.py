# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: arrays that really get smaller, of any function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .._core.compressed import Compressed
from .._errors import RecipeError

if TYPE_CHECKING:
    from .importance import Importance

_MEANS = ("norm", "keep")
_REPAIRS = (None, "least_squares", "bias")


def shrink(
    fn: Callable,
    params: Any,
    *inputs: Any,
    keep: Any,
    importance: str | Importance | Callable = "l2",
    calibration: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    round_to: int = 1,
    mean: str = "norm",
    repair: str | None = None,
) -> Compressed:
    """Removes the least important indices of coupled groups: smaller arrays and a function of them.

    A hidden unit leaves with its bias and the rows that read it, a head with its part of q, k, v
    and the output, a channel of a convolution with its norm and the convolutions behind it, a layer
    of a scan with all its slices. In a scan over stacked layers every layer keeps its own indices
    where nothing outside of it sees them. What belongs together is found in the jaxpr
    (`jaxcompress.prune.groups`); the function is written again with smaller shapes, so constants,
    slices, `iota` and the groups of convolutions fit. Where the removed slices are zero and nothing
    pools over them, it equals the original.

    Args:
      fn: `fn(params, *inputs)`, a forward pass. Inputs and outputs keep their sizes.
      params: arrays.
      inputs: of one call; `jax.ShapeDtypeStruct`s will do.
      keep: how much stays of every group:

        * a fraction in (0, 1] or a count, of every group but the layers of scans and what the
          function chooses among by `argmax` or `top_k` (classes, experts), which have to be named;
        * `{pattern: fraction, count or indices}`, patterns on the names of members as
          `jaxcompress.prune.groups` prints them, such as `"*/up:1"`; brackets stand for themselves.
          The first that matches a group decides; other groups stay whole. Indices are int[count],
          or int[layers, count] for a group with other indices in every layer;
        * `jaxcompress.prune.budget(flops=0.25)`: one limit for all groups.
      importance: the name of one of `jaxcompress.prune.importance` (`"l1"`, `"l2"`, `"fpgm"`,
        `"activation"`, `"wanda"`), what `taylor(loss)`, `gamma(pattern)` or `random(key)` there
        return, or a function `f(group, params) -> float[size]` or `[layers, size]`. The layers of a
        scan are scored by the cosine between outputs, `importance.cosine()`, always.
      calibration: batches (`jaxcompress.Inputs` for several arguments), for activations, Taylor
        and repair.
      round_to: sizes are multiples of it where the group is large enough.
      mean: `"norm"`: the mean of a norm is that of the channels that stay, all other means count
        removed channels as zeros. `"keep"`: every mean does.
      repair: what the sites that read a group get from what they lose. `"least_squares"`: weights
        (and biases, where there are) that reproduce their outputs on the calibration data;
        `"bias"`: biases only, the mean of what is lost.

    Returns:
      `Compressed(fn, params, report)`. `fn(params, *inputs)` can be jitted, mapped, differentiated,
      shrunk and quantized again, and exported.

    Raises:
      SiteError: a pattern matches no group, or only pinned ones; nothing can be removed.
      RecipeError: a fraction, count, index, budget or importance that is none, or data are missing.

    >>> import jax, jax.numpy as jnp
    >>> params = {"up": jax.random.normal(jax.random.key(0), (4, 8)), "down": jnp.ones((8, 3))}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> small = shrink(fn, params, jnp.ones((2, 4)), keep={"up:1": 0.5})
    >>> {name: w.shape for name, w in small.params.items()}
    {'down': (4, 3), 'up': (4, 4)}

    References: Fang et al. 2023 (DepGraph) for groups and their norms; Hubara et al. 2021 and
    Frantar and Alistarh 2022 for least-squares reconstruction; An et al. 2024 (FLAP) for biases.
    """
    from ._budget import Budget
    from ._structured import choice, report
    from ._structured.budget import within
    from ._structured.problem import LAYERS, problem
    from ._structured.repair import repaired
    from ._structured.small import small_function, small_params
    from .importance import cosine, get
    from .importance._base import measured

    choice.check_round_to(round_to)
    if mean not in _MEANS:
        raise RecipeError(f"mean={mean!r}: expected one of {list(_MEANS)}.")
    if repair not in _REPAIRS:
        raise RecipeError(f"repair={repair!r}: expected one of {list(_REPAIRS)}.")
    if repair is not None and calibration is None:
        raise RecipeError(f"repair={repair!r} needs data: pass calibration=.")
    method = get(importance)
    given = problem(fn, params, inputs, calibration)
    depth = [x for x, group in given.groups.items() if group.ordered == LAYERS]
    means = mean == "norm"

    def scorer(leaves: list) -> Callable:
        width = [x for x in leaves if x not in depth]
        across = measured(given, cosine(), depth)
        return _either(depth, across, measured(given, method, width) if width else across)

    def build(kept: Mapping) -> tuple[Callable, Any]:
        return small_function(given, kept, means), small_params(given, kept)

    if isinstance(keep, Budget):
        leaves = [x for x, group in given.groups.items() if not group.pinned]
        kept = within(given, keep, scorer(leaves), round_to, build)
    else:
        wanted = choice.wanted(given, keep)
        for leaf, how in wanted.items():  # before anything takes long
            choice.check(how, given.groups[leaf], round_to)
        scored = [x for x, how in wanted.items() if choice.needs_scores(how)]
        kept = choice.chosen(given, wanted, scorer(scored), round_to)
    notes: dict[str, str] = {}
    if repair is not None:
        given = repaired(given, kept, repair, notes)
    small, arrays = build(kept)
    return Compressed(small, arrays, report.report(given, kept, notes))


def _either(depth: list, across: Callable, width: Callable) -> Callable:
    return lambda leaf: across(leaf) if leaf in depth else width(leaf)
