# SPDX-License-Identifier: Apache-2.0
"""`report`: every weight and every matmul with its format, bytes, noise, and why if left alone."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from .._core.qtensor import nbytes
from .._core.sites import Site
from .._core.transform import ArgNums, Traced, Transformed, name_of
from . import recipes
from .aware import QuantizeAware, describe, quantized, why_not
from .recipe import Recipe

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One site, or one parameter that no site reads.

    Attributes:
      site: name of the site, or key path of the parameter.
      op: name of the primitive; empty for a parameter.
      shape: of the weight (of the parameter), with the sizes of enclosing layer scans in front.
      weight: format of the weight, `float32` and the like if left alone; None without a weight.
      activation: format of the activation; None without one.
      bytes_before, bytes_after: of what is stored, packed codes and scales; 0 if stored elsewhere.
      snr_db: power of the site's result over that of its error, in dB; None if not run.
      reason: why it was left alone, or a remark; empty if everything was as asked.
      source: `file:line` of the operation.
    """

    site: str
    op: str
    shape: tuple[int, ...]
    weight: str | None
    activation: str | None
    bytes_before: int
    bytes_after: int
    snr_db: float | None
    reason: str
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a recipe does to a function. Prints as a table."""

    name: str
    recipe: str
    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters as they are."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as the recipe stores them."""
        return sum(row.bytes_after for row in self.rows)

    def to_json(self) -> str:
        """JSON text with the name, the recipe, the totals and all rows."""
        data = dataclasses.asdict(self)
        data |= {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return json.dumps(data, indent=2)

    def table(self) -> Table:
        """The rows as a `rich` table."""
        from rich.table import Table

        total = f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        table = Table(title=f"{self.name}, recipe {self.recipe}: {total}")
        table.add_column("site", overflow="fold")
        for column in ("op", "shape", "weight", "activation"):
            table.add_column(column)
        for column in ("bytes before", "after", "SNR dB"):
            table.add_column(column, justify="right")
        table.add_column("left alone because", overflow="fold")
        for row in self.rows:
            table.add_row(*_cells(row))
        return table

    def to_html(self, path: str) -> None:
        """Writes the table as a page of HTML."""
        from rich.console import Console

        console = Console(record=True, width=160, file=io.StringIO())
        console.print(self.table())
        console.save_html(str(path))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as text:
            console.print(self.table())
        return text.get()


def _cells(row: Row) -> list[str]:
    snr = "" if row.snr_db is None else f"{row.snr_db:.1f}"
    shape = "x".join(map(str, row.shape))
    sizes = [f"{row.bytes_before:,}", f"{row.bytes_after:,}"]
    return [row.site, row.op, shape, row.weight or "", row.activation or "", *sizes, snr, row.reason]


@dataclasses.dataclass(frozen=True)
class _Noise(QuantizeAware):
    """Measures signal and noise at the result of every quantized site, without changing it."""

    kind = "noise"
    stateful = True

    def init_state(self, site: Site, setting: Any) -> Any:
        return jnp.zeros(2, jnp.float32)

    def apply(self, site, setting, bind, operands, learned, state):
        out = bind(*operands)
        clean, noisy = (
            jnp.asarray(x[0] if isinstance(x, list) else x, jnp.float32)
            for x in (out, bind(*quantized(site, setting, operands)))
        )
        new = jnp.stack([jnp.sum(clean**2), jnp.sum((noisy - clean) ** 2)])
        axes = tuple(sorted({a for o in site.operands for s in o.manual or () for a in s}))
        return out, state + (lax.psum(new, axes) if axes else new)


def report(
    fn: Callable, recipe: str | Recipe | None = None, argnums: ArgNums = 0
) -> Callable[..., Report]:
    """Says what a recipe does to a function: every weight and every matmul, nothing left out.

    Args:
      fn: any function that JAX can trace.
      recipe: name of a recipe or a `Recipe`; None lists everything as it is.
      argnums: position (or name) of the argument that holds the parameters, or several.

    Returns:
      A function of the arguments of `fn` that returns a `Report`. With arrays as arguments the
      function is run once and the signal-to-noise ratio at the result of every site is measured;
      with `jax.ShapeDtypeStruct`s nothing is computed.

    Raises:
      RecipeError, SiteError: as `quantize_aware`.

    >>> import jax.numpy as jnp
    >>> fn = lambda p, x: x @ p["w"] + p["b"]
    >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
    >>> for row in report(fn, "w8a16")(params, jnp.ones((2, 4))).rows:
    ...     print(row.site, row.weight, row.bytes_before, row.bytes_after, row.reason)
    w int8 per channel 128 64
    b float32 32 32 read by no matmul, convolution or embedding
    """
    chosen = Recipe([], "none") if recipe is None else recipes.get(recipe)
    measure = Transformed(fn, _Noise(chosen), argnums)

    def run(*args, **kwargs) -> Report:
        traced = measure.trace(*args, **kwargs)
        snr: dict[str, float] = {}
        leaves = jax.tree.leaves((args, kwargs))
        if traced.plan.names and not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
            _, state = measure.init(*args, **kwargs)
            _, state = measure.call({}, state, args, kwargs)
            snr = {n: r for n, v in state.items() if (r := _decibel(v)) is not None}
        return Report(name_of(fn), chosen.name, tuple(_rows(traced, chosen, snr)))

    return run


def _decibel(power: jax.Array) -> float | None:
    signal, noise = (float(v) for v in jnp.sum(power.reshape(-1, 2), 0))
    if signal == 0:
        return None
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _rows(traced: Traced, recipe: Recipe, snr: Mapping[str, float]) -> list[Row]:
    shapes = dict(traced.leaves)
    left = {path: math.prod(s.shape) for path, s in shapes.items()}
    once = {s.name: s for s in reversed(traced.sites)}
    sites = [s for s in dict.fromkeys(traced.sites) if once[s.name] is s]
    settings = QuantizeAware(recipe).choose(sites)
    readers: dict[str, int] = {}
    for site in sites:
        for path in _paths(site):
            readers[path] = readers.get(path, 0) + 1
    rows = []
    for site in sites:
        setting = settings.get(site.name, (None,) * len(site.operands))
        remark = _reason(site, recipe) if not any(setting) else ""
        before = after = 0
        weights = [i for i in site.weights if len(site.weights) == 1]
        for i in weights:
            before, after, note = _stored(site, i, setting[i], shapes, left, readers)
            remark = remark or note
        rows.append(
            Row(
                site=site.name,
                op=site.op,
                shape=(*site.stack, *site.operands[(weights or [0])[0]].shape),
                weight=_format(site, setting, "weight"),
                activation=_format(site, setting, "activation"),
                bytes_before=before,
                bytes_after=after,
                snr_db=snr.get(site.name),
                reason=remark,
                source=site.source,
            )
        )
    for path, shape in shapes.items():
        if left[path] or not math.prod(shape.shape):
            size = nbytes(shape) * left[path] // max(math.prod(shape.shape), 1)
            why = "only partly read by" if path in readers else "read by"
            reason = f"{why} {'a' if path in readers else 'no'} matmul, convolution or embedding"
            name = str(shape.dtype)
            rows.append(Row(path, "", shape.shape, name, None, size, size, None, reason, ""))
    return rows


def _paths(site: Site) -> list[str]:
    return [p for i in site.weights for p in site.operands[i].path.split("+")]


def _stored(
    site: Site,
    i: int,
    quantizer: Any,
    shapes: Mapping[str, Any],
    left: dict[str, int],
    readers: Mapping[str, int],
) -> tuple[int, int, str]:
    """(bytes before, bytes after, remark) of the parameters that operand `i` is read from."""
    operand = site.operands[i]
    paths = operand.path.split("+")
    size = math.prod(operand.shape)
    copies = math.prod(site.stack)
    if len(paths) == 1:
        path = paths[0]
        total = math.prod(shapes[path].shape)
        take = min(size * copies, left[path])
        if readers[path] == 1:
            take = left[path]  # a slice that a loop picks: it reads the whole array in the end
        if take == 0 and total:
            return 0, 0, f"stored with the first use of `{path}`"
        before = nbytes(shapes[path]) * take // max(total, 1)
        left[path] -= take
    else:
        take = size * copies
        before = sum(nbytes(shapes[p]) * left[p] // max(math.prod(shapes[p].shape), 1) for p in paths)
        for path in paths:
            left[path] = 0
    if quantizer is None:
        return before, before, ""
    one = quantizer.nbytes(operand.shape, site.contracting(i))
    remark = ""
    if quantizer.granularity.size and quantizer.scale_shape(operand.shape, site.contracting(i)) == (
        dataclasses.replace(quantizer, granularity="channel").scale_shape(
            operand.shape, site.contracting(i)
        )
    ):
        remark = f"{quantizer.granularity} does not fit: one scale per channel"
    return before, one * take // max(size, 1), remark


def _format(site: Site, setting: Sequence, role: str) -> str | None:
    for operand, quantizer in zip(site.operands, setting, strict=True):
        if operand.role == role:
            return describe(quantizer) if quantizer else str(jnp.dtype(operand.dtype))
    return None


def _reason(site: Site, recipe: Recipe) -> str:
    found = recipe.rule_for(site)
    if found is None:
        return "no rule matches"
    if found[1].leaves_alone:
        return f"left alone by rule {found[1].pattern!r}"
    return why_not(site, found[1]) or "left alone"
