# SPDX-License-Identifier: Apache-2.0
"""What a teacher says about a data set, written once and read while students train.

A directory with one file for each batch, `outputs-00000.safetensors`, ..., as `save_params` writes
them, and `recording.json`, sealed, when all are there: the number of batches, their rows, and the
digest of the header of each file.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import ArtifactError, JaxCompressError
from .._files import single
from .._files.safetensors import read_header
from .._files.sealed import LIMIT, check_seal, parse, seal
from .._files.whole import member, new_file, read_small
from ._batch import Selector, pick
from ._match import Match, observed
from ._top_k import TopK, top_k

INDEX = "recording.json"
_NAME = re.compile(r"outputs-\d{5,}\.safetensors")
_TEMPORARY = re.compile(rf"\.({_NAME.pattern}|{re.escape(INDEX)})-[0-9a-f]+")
_VERSION = 1


class Recording:
    """The outputs that `record` wrote, a sequence with one item for each batch.

    An item is what `loss(..., teacher_outputs=...)` takes. It is read, and its checksum checked,
    when it is asked for; nothing is kept.

    Args:
      path: the directory.

    Raises:
      ArtifactError: there is no recording, it is unfinished, or a file of it is missing or
        damaged. What is wrong with the arrays of a file shows when they are read.
    """

    def __init__(self, path: str | PathLike[str]):
        self.path = pathlib.Path(path)
        if not (self.path / INDEX).exists():
            count = len(_files(self.path)) if self.path.is_dir() else 0
            raise ArtifactError(
                f"{self.path} is no finished recording: it has {count} batches and no {INDEX}. "
                "Call jaxcompress.distill.record with the same arguments: it goes on behind them."
            )
        index = member(self.path, INDEX)
        text = read_small(index, LIMIT)
        data = parse(text, index) if check_seal(text, "recording", index) else {}
        files, rows = data.get("files"), data.get("rows")
        if data.get("version") != _VERSION or not isinstance(files, list):
            raise ArtifactError(f"{index} is damaged, or of another version than {_VERSION}.")
        for i, digest in enumerate(files):
            if read_header(self._file(i)).digest != digest:
                raise ArtifactError(
                    f"{self._file(i)} is not the file that {INDEX} was written with. Delete "
                    f"{INDEX} and this file and record again."
                )
        self._ends = np.cumsum(np.asarray(rows, int))

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._ends)

    def __getitem__(self, i: int) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} batches, asked for number {i}.")
        return _outputs(single.load(self._file(i % len(self))))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    @property
    def rows(self) -> int:
        """The number of rows (examples) of all batches."""
        return int(self._ends[-1]) if len(self) else 0

    def take(self, rows: Any) -> Any:
        """The outputs of some rows, in this order: for batches that are shuffled anew.

        Only what is asked for is read from the disk, and checksums are not looked at.

        Args:
          rows: int[n], counted from 0 through all batches as they were recorded.

        Raises:
          JaxCompressError: there are no such rows.
        """
        rows = np.asarray(rows)
        wrong = (rows < 0) | (rows >= self.rows)
        if rows.ndim != 1 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise JaxCompressError(f"take: rows are {rows.dtype}{list(rows.shape)}, not int[n].")
        if wrong.any():
            raise JaxCompressError(
                f"take: row {rows[wrong][0]} of a recording with {self.rows} rows ({self.path})."
            )
        where = np.searchsorted(self._ends, rows, side="right")
        parts, order = [], np.argsort(where, kind="stable")
        for i in np.unique(where):
            begin = self._ends[i - 1] if i else 0
            own = rows[order][where[order] == i] - begin
            shard = _outputs(single.load(self._file(int(i)), lazy=True))
            parts.append(jax.tree.map(lambda x, own=own: np.asarray(x)[own], shard))
        back = np.argsort(order, kind="stable")
        return jax.tree.map(lambda *xs: jnp.asarray(np.concatenate(xs)[back]), *parts)

    def _file(self, i: int) -> pathlib.Path:
        return member(self.path, _file_name(i))


def record(
    teacher: Any,
    batches: Iterable[Any],
    path: str | PathLike[str],
    *,
    teacher_params: Any = None,
    inputs: Selector | None = None,
    top_k: int | None = None,
    match: Match | Sequence[Match] = (),
    dtype: Any = None,
) -> Recording:
    """Writes what a teacher says about each batch to a directory, one file at a time.

    An interrupted call is resumed by the same call: batches whose file is there are passed over,
    and the files are those of a call that was not interrupted. One batch is in memory at a time.

    Args:
      teacher: `teacher(inputs)`, or `teacher(teacher_params, inputs)` -> logits
        float[rows, ..., classes]. It is compiled once for each shape of a batch.
      batches: the same ones, in the same order, whenever the recording is resumed.
      path: a directory: new, empty, or an unfinished or finished recording.
      teacher_params: of the teacher.
      inputs: where in a batch the inputs are, an index, a key, or a function; all of it if left
        out.
      top_k: keep the k likeliest classes (`TopK`) instead of all logits.
      match: matches, as `loss_fn` takes them, whose features of the teacher are stored as well.
      dtype: the dtype in which floats are stored, such as `jnp.bfloat16`; their own if left out.

    Raises:
      ArtifactError: a file that is there is damaged, belongs to other batches or settings, or is
        none of a recording; or the disk cannot be written, and nothing half stays there.
      JaxCompressError: there are no batches, or outputs whose rows differ in number.
      SiteError: a pattern of `match` matches nothing.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxcompress import distill
    >>> batches = [jnp.ones((4, 3)), jnp.zeros((2, 3))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recording = record(lambda x: x @ jnp.eye(3), batches, folder, top_k=2)
    ...     len(recording), recording.rows, recording[1].log_probs.shape
    (2, 6, (2, 2))
    """
    path = pathlib.Path(path)
    matches = (match,) if isinstance(match, Match) else tuple(match)
    wanted = [(m.teacher_pattern, m.output) for m in matches]
    settings = {
        "top_k": top_k,
        "features": [list(w) for w in wanted],
        "dtype": None if dtype is None else jnp.dtype(dtype).name,
    }
    _check_folder(path)

    @jax.jit
    def said(params: Any, x: Any) -> dict[str, Any]:
        def run(params, x):
            return teacher(x) if params is None else teacher(params, x)

        output, seen = observed(run, "teacher", wanted, params, x)
        features = [list(found.values()) for found in seen]
        if top_k is not None:
            output = _top_k(output, top_k)._asdict()
        found = {"output": output, "features": features}
        return jax.tree.map(lambda v: v.astype(_stored(v, dtype)), found)

    rows, digests, count = [], [], 0
    for count, batch in enumerate(batches, 1):
        x = pick(batch, inputs) if inputs is not None else batch
        file = path / _file_name(count - 1)
        about = {"settings": settings, "inputs": single.fingerprint(x)}
        if file.exists():
            shard = _checked(file, about)
        else:
            shard = about | said(teacher_params, x)
            single.save(shard, file)
        rows.append(_rows(file.name, shard))
        digests.append(read_header(file).digest)
    left = [p.name for p in _files(path)[count:]] if path.is_dir() else []
    if left or not count:
        raise JaxCompressError(
            f"record: {count} batches were given"
            + (f", and {path} has files of more: {left[0]}." if left else ": nothing to record.")
        )
    with new_file(path / INDEX) as index:
        index.write(seal("recording", {}, {"version": _VERSION, "rows": rows, "files": digests}))
    return Recording(path)


_top_k = top_k  # `record` has an argument of that name


def _file_name(i: int) -> str:
    return f"outputs-{i:05}.safetensors"


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    found = [p for p in path.iterdir() if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _check_folder(path: pathlib.Path) -> None:
    """Removes what a killed call left half written; raises if there are other things."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(f"{path} exists and is no directory. Choose another path.")
    for file in path.iterdir():
        if _TEMPORARY.fullmatch(file.name):
            file.unlink()
        elif file.name != INDEX and not _NAME.fullmatch(file.name):
            raise ArtifactError(
                f"{path} holds other things than a recording: {file.name}. Choose another path."
            )


def _checked(file: pathlib.Path, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call wrote about a batch.

    Raises:
      ArtifactError: the file is damaged, or was written about something else.
    """
    try:
        shard = single.load(file)
    except ArtifactError as error:
        raise ArtifactError(f"{error} Delete it and call record again: it is made anew.") from error
    for what, expected in about.items():
        if not isinstance(shard, dict) or shard.get(what) != expected:
            raise ArtifactError(
                f"{file} was recorded with other {what} than those that are given now. Give the "
                "same batches in the same order and the same settings, or choose another path."
            )
    return shard


def _rows(name: str, shard: dict[str, Any]) -> int:
    leaves = jax.tree.leaves((shard["output"], shard["features"]))
    counts = {np.shape(x)[:1] for x in leaves}
    if len(counts) != 1 or () in counts:
        raise JaxCompressError(
            f"record: outputs and features in {name} have {sorted(counts)} rows: their first "
            "dimension must be that of the examples, and the same."
        )
    return counts.pop()[0]


def _outputs(shard: dict[str, Any]) -> Any:
    """What `teacher_outputs=` takes."""
    output = shard["output"]
    output = TopK(**output) if isinstance(output, dict) else output
    if not shard["features"]:
        return output
    return {"output": output, "features": shard["features"]}


def _stored(x: Any, dtype: Any) -> Any:
    return dtype if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
