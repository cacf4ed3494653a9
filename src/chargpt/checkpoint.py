"""Checkpoints: one self-contained file each, replaced as a whole and read without trusting it.

    line 1     the header, JSON: format, step, configuration, vocabulary, table of leaves, …
    then       the leaves as `eqx.tree_serialise_leaves` writes them, readable without chargpt
    last 32    SHA-256 of everything before

Loading runs no code of the file's author: the configuration is data under our own schema, arrays
are read without pickle, and no leaf takes more memory than the file has bytes for it.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from chargpt.config import Config, from_plain, to_plain
from chargpt.errors import ConfigError, one_line, require
from chargpt.files import write_durably
from chargpt.train import TrainState, init_state

FORMAT = 2
MAX_HEADER_BYTES = 1 << 20
MAX_REASON = 500  # characters
MAX_LEAF_HEADER_BYTES = 1 << 17  # NumPy's own limit is half of it
DIGEST_BYTES = 32


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used. Its text is one line: which file, what is wrong."""

    def __init__(self, text: str):
        super().__init__(one_line(text)[:MAX_REASON])  # it may quote a stranger's names


class Which(StrEnum):
    """The checkpoints that a person chooses between."""

    best = "best"
    last = "last"


@dataclasses.dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself, apart from its leaves."""

    config: Config
    vocabulary: str
    corpus_sha256: str
    step: int
    seconds: float  # wall time trained so far
    best_val_loss: float | None
    best_step: int | None
    versions: dict[str, str]
    record_sizes: dict[str, int]  # bytes of the run's metrics and samples at this step

    def to_json(self, leaves: list[list[Any]]) -> bytes:
        plain = {**vars(self), "config": to_plain(self.config)}
        return json.dumps({"format": FORMAT, **plain, "leaves": leaves}).encode() + b"\n"


def describe_leaves(tree: PyTree) -> list[list[Any]]:
    """[path, dtype, shape] of every array (or shape of one), in the order of the file."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, _has_shape))
    return [[_name(path), str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves]


def _has_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".")


def save(path: Path, state: TrainState, header: Header) -> None:
    """Write the checkpoint; on OSError the old file is still there, and nothing else is."""
    write(path, dump(state, header))


def dump(state: TrainState, header: Header | None) -> memoryview:
    """The file without its digest, the same from any layout.

    All processes that share a state must call this, since each has a part of every leaf; those that
    do not write give no header and get nothing. No more than one leaf is gathered at a time.
    """
    body = io.BytesIO()
    if header is not None:
        body.write(header.to_json(describe_leaves(state)))
    for leaf in jax.tree.leaves(eqx.filter(state, eqx.is_array)):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        if header is not None:
            whole = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
            np.save(body, np.asarray(whole), allow_pickle=False)
    return body.getbuffer()


def write(path: Path, data: memoryview) -> None:
    """Write what `dump` returned, with its digest."""
    write_durably(path, data, hashlib.sha256(data).digest())


def keep_as(path: Path, other: Path) -> None:
    """Let `other` also name the file at `path`: the next save of `path` leaves it intact."""
    link = other.with_suffix(".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a filesystem without hard links
        write_durably(other, path.read_bytes())
        return
    os.replace(link, other)
    link.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing


@contextlib.contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """CheckpointError for whatever goes wrong in the block: it handles a stranger's data."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{problem} ({error})") from error


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem)


def read_header(path: Path) -> tuple[Header, list[list[Any]], memoryview]:
    """(header, table of leaves, bytes of the leaves); CheckpointError unless intact and ours."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    content, digest = memoryview(data)[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    intact = len(data) > DIGEST_BYTES and hashlib.sha256(content).digest() == digest
    _check(intact, f"{path}: is damaged or incomplete (its SHA-256 does not match)")
    end = max(0, data.find(b"\n", 0, min(MAX_HEADER_BYTES, len(content))))
    with _refusing(f"{path}: is not a chargpt checkpoint: its first line is not a JSON header"):
        fields = json.loads(data[:end])
        require(isinstance(fields, dict), "it is not an object")
    ours = fields.pop("format", None) == FORMAT
    _check(ours, f"{path}: is not of format {FORMAT}, which this version of chargpt reads")
    with _refusing(f"{path}: its header does not fit this version of chargpt"):
        leaves = fields.pop("leaves")
        is_table = isinstance(leaves, list) and all(isinstance(leaf, list) for leaf in leaves)
        require(is_table, "leaves: is not a table")
        smallest = min(fields["record_sizes"].values(), default=0)
        require(smallest >= 0, "record_sizes: holds a negative size")
        header = Header(**fields | {"config": from_plain(fields["config"])})
    return header, leaves, content[end + 1 :]


def load(path: Path, on_host: bool = False) -> tuple[TrainState, Header]:
    """(state, header); CheckpointError unless every leaf is exactly that of the header's model.

    With `on_host` the leaves are NumPy's, views of the file's bytes: no device holds one yet.
    """
    header, leaves, body = read_header(path)
    with _refusing(f"{path}: its configuration makes no model"):
        vocab_size, seed = len(header.vocabulary), header.config.seed
        skeleton = eqx.filter_eval_shape(init_state, header.config, vocab_size, seed)
    expected = describe_leaves(skeleton)
    if leaves != expected:
        rows = itertools.zip_longest(expected, leaves)
        odd = next(wanted or found for wanted, found in rows if wanted != found)
        listed = " ".join(map(str, odd))
        raise CheckpointError(f"{path}: its leaves are not those of its configuration: {listed}")

    def read(leaf_path: Any, leaf: Any) -> Any:
        nonlocal body
        if not _has_shape(leaf):
            return leaf
        with _refusing(f"{path}: its leaf {_name(leaf_path)} cannot be read"):
            array, body = _read_leaf(body, leaf)
            return array if on_host else jnp.array(array)

    state = jax.tree_util.tree_map_with_path(read, skeleton)
    _check(len(body) == 0, f"{path}: holds {len(body):,} bytes after its last leaf")
    step = int(state.step)
    _check(step == header.step, f"{path}: its header says step {header.step}, its leaves {step}")
    return state, header


def _read_leaf(data: memoryview, leaf: jax.ShapeDtypeStruct) -> tuple[np.ndarray, memoryview]:
    """(array, what follows it), its shape and dtype checked before its bytes are looked at."""
    file = io.BytesIO(data[:MAX_LEAF_HEADER_BYTES])
    version = np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if (version, fortran_order) != ((1, 0), False):
        raise ValueError("is not as numpy.save writes it")
    if (shape, dtype) != (leaf.shape, np.dtype(leaf.dtype)):
        raise ValueError(f"holds {dtype} {shape} instead of {leaf.dtype} {leaf.shape}")
    begin, end = file.tell(), file.tell() + dtype.itemsize * math.prod(shape)
    return np.frombuffer(data[begin:end], dtype).reshape(shape), data[end:]


def open_run(run: str | None, which: Which) -> tuple[Path, TrainState, Header]:
    """(directory, state, header) of a checkpoint of a run, by default of the newest one.

    ConfigError if there is none, or it cannot be used.
    """
    run_dir = find_run(run, which)
    return run_dir, *load(file_of(run_dir, which))


def find_run(run: str | None, which: Which) -> Path:
    """The directory of a run that has the checkpoint, by default of the newest one.

    ConfigError if there is none; the checkpoint is not read.
    """
    if run is None:
        roots = map(Path, ("outputs", "multirun"))
        found = [path for root in roots for path in root.glob(str(file_of(Path("**"), which)))]
        train_one = "train one with main.py, or write run=DIR"
        require(bool(found), f"run: there is none in outputs/ or multirun/; {train_one}")
        return max(found, key=lambda path: path.stat().st_mtime).parents[1]
    path = file_of(Path(run), which)
    require(Path(run).is_dir(), f"run={run}: there is no such directory")
    require(path.is_file(), f"run={run}: has no checkpoint {file_of(Path(), which)}")
    return Path(run)


def file_of(run_dir: Path, name: str) -> Path:
    """The file of a run's checkpoint: best, last, or previous, the last one before."""
    return run_dir / "checkpoints" / f"{name}.eqx"
