# SPDX-License-Identifier: Apache-2.0
"""`verify`: an artifact against a function, output by output and site by site."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from .._core.tabular import Tabular
from .._errors import ArtifactError
from .._quantize.calibrate import Inputs
from ._packing import Packing
from ._program import Program, flat


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One site or output over all batches.

    Attributes:
      name: of the site, or the key path of the output.
      kind: "site" or "output".
      shape, dtype: of the artifact's value, in the last batch.
      values: how many were compared.
      different: how many differ in their bits; NaN equals NaN.
      largest: the largest absolute difference.
      first: where the first difference is, and both values; empty without one.
      scale: the largest absolute value of the function.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    values: int = 0
    different: int = 0
    largest: float = 0.0
    first: str = ""
    scale: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verification(Tabular):
    """What `verify` found. Prints as a table; true if every bit agrees."""

    path: str
    platform: str
    against: str
    rows: tuple[Comparison, ...]

    @property
    def equal(self) -> bool:
        """Whether every bit agrees."""
        return self.first_difference is None

    @property
    def first_difference(self) -> Comparison | None:
        """The first site in program order that differs; else the first output; else None."""
        return next((row for row in self.rows if row.different), None)

    def close(self, tolerance: float) -> bool:
        """Whether no difference is larger than this share of the largest value of its row."""
        return all(row.largest <= tolerance * row.scale for row in self.rows)

    def __bool__(self) -> bool:
        return self.equal

    @property
    def title(self) -> str:
        """The artifact and the verdict in a line."""
        first = self.first_difference
        verdict = "equal in every bit"
        if first is not None:
            verdict = f"the first difference is at {first.kind} {first.name}, {first.first}"
        return f"{self.path} on {self.platform} against {self.against}: {verdict}"

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """(heading, whether it holds numbers) of each column."""
        names = ("values", "different", "largest difference")
        head = [("name", False), ("kind", False), ("shape", False), ("dtype", False)]
        return [*head, *((name, True) for name in names), ("first difference", False)]

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [
            [
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                row.dtype,
                f"{row.values:,}",
                f"{row.different:,}",
                f"{row.largest:.3g}",
                row.first,
            ]
            for row in self.rows
        ]

    def to_json(self) -> str:
        """JSON text with all rows; a difference that is not finite is a text."""
        data: dict[str, Any] = dataclasses.asdict(self) | {"equal": self.equal}
        for row in data["rows"]:
            if not np.isfinite(row["largest"]):
                row["largest"] = str(row["largest"])
        return json.dumps(data, indent=2, allow_nan=False)


def verify(
    artifact: Any,
    fn: Callable | None = None,
    params: Any = None,
    batches: Iterable[Any] | None = None,
) -> Verification:
    """Compares an artifact with a function on the same inputs, bit by bit, on this machine.

    Args:
      artifact: of `stablehlo`, `onnx` or `load`. Other runtimes than XLA sum in another order:
        look at the largest difference, or at `.close(tolerance)`.
      fn, params: the function that it was made of, and its parameters. Without them the artifact
        is compared with what `fn` made of the example inputs when it was exported. Sites are
        those of `fn` on packed parameters.
      batches: inputs; one is one argument, `jc.Inputs(*args)` several. The example inputs of the
        export if left out.

    Raises:
      ArtifactError: the artifact has no example inputs and none are given, or the function has
        other sites.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxcompress as jc
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     artifact = jc.export.stablehlo(fn, params, jnp.ones((1, 4)), path=folder + "/a")
      ...     found = verify(artifact, fn, params, [jnp.ones((1, 4))])
      >>> found.equal
      True
    """
    rows: dict[tuple[str, str], Comparison] = {}
    for i, (inputs, outputs, sites) in enumerate(_expected(artifact, fn, params, batches)):
        if sites is not None:
            got = artifact.run_sites(*inputs)
            if got.keys() != sites.keys():
                other = sorted(got.keys() ^ sites.keys())
                raise ArtifactError(
                    f"{artifact.path} and the function do not have the same sites: only one of "
                    f"them has {', '.join(f'`{name}`' for name in other[:5])}."
                )
            for name in artifact.sites:
                _compare(rows, "site", name, got[name], sites[name], i)
        arrays = artifact.run_arrays(*inputs)
        if len(arrays) != len(outputs):
            raise ArtifactError(
                f"{artifact.path} returns {len(arrays)} arrays, the function {len(outputs)}."
            )
        for (name, _, _), a, b in zip(artifact.outputs.arrays, arrays, outputs, strict=True):
            _compare(rows, "output", name or "output", a, b, i)
    against = "its reference" if fn is None else getattr(fn, "__name__", type(fn).__name__)
    platform = jax.default_backend()
    ordered = sorted(rows.values(), key=lambda row: row.kind == "output")
    return Verification(str(artifact.path), platform, against, tuple(ordered))


def _expected(
    artifact: Any, fn: Callable | None, params: Any, batches: Iterable[Any] | None
) -> Iterator[tuple[tuple, list, dict[str, jax.Array] | None]]:
    """(inputs, outputs, results of sites) of the function, by batch."""
    if fn is None or batches is None:
        reference = artifact.reference
        if reference is None:
            raise ArtifactError(
                f"{artifact.path} holds no example inputs to compare on. Give batches, or export "
                "it with arrays as example inputs."
            )
        inputs = artifact.inputs.rebuild(reference["inputs"])
        if fn is None:
            yield inputs, reference["outputs"], reference.get("sites")
            return
        batches = [Inputs(*inputs)]
    empty = True
    for batch in batches:
        empty = False
        inputs = batch.args if isinstance(batch, Inputs) else (batch,)
        program = Program(fn, params, inputs)
        outputs = jax.jit(flat(program.run)[0])(program.leaves, program.inputs)
        sites = None
        if artifact.sites:  # of packed parameters: XLA may sum in another order for floats
            packed = Program(fn, Packing(fn).pack(params, inputs), inputs)
            sites = jax.jit(packed.run_sites)(packed.leaves, packed.inputs)
        yield inputs, outputs, sites
    if empty:
        raise ArtifactError("verify got no batches. Pass at least one.")


def _compare(rows: dict, kind: str, name: str, got: Any, want: Any, batch: int) -> None:
    """Adds one batch to the row of a site or output."""
    a, b = np.asarray(got), np.asarray(want)
    old = rows.get((kind, name), Comparison(name, kind, a.shape, str(a.dtype)))
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ArtifactError(
            f"The {kind} `{name}` is {a.dtype}{list(a.shape)} in the artifact and "
            f"{b.dtype}{list(b.shape)} in the function."
        )
    differs = ~((a == b) | ((a != a) & (b != b)))
    if a.dtype.kind not in "biuc":
        differs |= (np.signbit(a) != np.signbit(b)) & (a == b)
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    where, first = np.argwhere(differs), old.first
    largest = old.largest
    if len(where):
        i = tuple(where[0].tolist())
        first = first or f"batch {batch}, index {i}: {a[i]} in the artifact, {b[i]} in the function"
        gap = np.abs(a[differs].astype(wide) - b[differs].astype(wide))
        largest = max(largest, float(np.max(np.where(np.isnan(gap), np.inf, gap))))
    sizes = np.abs(b.astype(wide))
    rows[kind, name] = Comparison(
        name,
        kind,
        a.shape,
        old.dtype,
        old.values + a.size,
        old.different + len(where),
        largest,
        first,
        max(old.scale, float(np.max(sizes, initial=0, where=np.isfinite(sizes)))),
    )
