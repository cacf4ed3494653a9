"""A checkpoint is one self-contained file, written so that no fault leaves half of one, and read without trusting it.

    line 1     the header, JSON: format version, step, best value, configuration, vocabulary, the table of leaves, …
    then       the leaves, as `eqx.tree_serialise_leaves` writes them (any Equinox program can read them)
    last 32    SHA-256 of everything before

Loading runs no code of the file's author: the configuration is data under our own schema, arrays are read without pickle,
and nothing is allocated that the file's size does not cover.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
from enum import Enum
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from chargpt.config import Config, from_plain, to_plain
from chargpt.errors import ConfigError, one_line, require
from chargpt.files import write_durably
from chargpt.train import TrainState, init_state

FORMAT = 2
MAX_HEADER_BYTES = 1 << 20
MAX_REASON = 500  # characters
DIGEST_BYTES = 32


class CheckpointError(Exception):
    """A checkpoint that cannot be used. Its text is one line: which file, what is wrong."""

    def __init__(self, text: str):
        super().__init__(one_line(text)[:MAX_REASON])  # it may quote a stranger's names


class Which(Enum):
    """The checkpoints that a person chooses between."""

    best = "best"
    last = "last"


@dataclasses.dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself, besides its leaves."""

    config: Config
    vocabulary: str
    corpus_sha256: str
    step: int
    seconds: float  # wall time trained so far
    best_val_loss: float | None
    best_step: int | None
    versions: dict[str, str]
    record_sizes: dict[str, int]  # bytes of the run's metrics and samples when this was written

    def to_json(self, leaves: list[list[Any]]) -> bytes:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"config": to_plain(self.config)}
        return json.dumps({"format": FORMAT, **fields, "leaves": leaves}).encode() + b"\n"


def describe_leaves(tree: PyTree) -> list[list[Any]]:
    """[path, dtype, shape] of every array, in the order they are written; arrays and their shapes alike."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    is_array = lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return [
        [jax.tree_util.keystr(path).lstrip("."), str(leaf.dtype), list(leaf.shape)]
        for path, leaf in leaves
        if is_array(leaf)
    ]


def save(path: Path, state: TrainState, header: Header) -> None:
    """Write the checkpoint; OSError where that fails, and then the old file is still there and nothing else is."""
    body = io.BytesIO()
    body.write(header.to_json(describe_leaves(state)))
    eqx.tree_serialise_leaves(body, jax.device_get(state), filter_spec=_write_leaf)
    data = body.getbuffer()
    write_durably(path, data, hashlib.sha256(data).digest())


def keep_as(path: Path, other: Path) -> None:
    """Let `other` name the file at `path` too, which the next save will replace: there is a whole checkpoint throughout."""
    link = other.with_suffix(".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a filesystem without hard links
        write_durably(other, path.read_bytes())
        return
    os.replace(link, other)
    link.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing


def _write_leaf(file: io.BytesIO, leaf: Any) -> None:
    if isinstance(leaf, np.ndarray | np.generic):
        np.save(file, leaf, allow_pickle=False)


def read_header(path: Path) -> tuple[Header, list[list[Any]], memoryview]:
    """(header, table of leaves, bytes of the leaves) of a verified file; CheckpointError where it is not whole or not ours."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    content, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if len(data) <= DIGEST_BYTES or hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{path}: is damaged or incomplete (its SHA-256 does not match)")
    end = content.find(b"\n", 0, MAX_HEADER_BYTES)
    try:
        fields = json.loads(content[:end]) if end > 0 else None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: is no chargpt checkpoint (its first line is not a JSON header)"
        )
    if fields.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{path}: is of another format than {FORMAT}, the one this version of chargpt reads"
        )
    try:
        leaves = fields.pop("leaves")
        if not isinstance(leaves, list) or not all(isinstance(leaf, list) for leaf in leaves):
            raise ValueError("leaves: is no table")
        if min(fields["record_sizes"].values(), default=0) < 0:
            raise ValueError("record_sizes: holds a negative size")
        header = Header(**fields | {"config": from_plain(fields["config"])})
    except Exception as error:
        raise CheckpointError(
            f"{path}: its header does not fit this version of chargpt ({error})"
        ) from error
    return header, leaves, memoryview(content)[end + 1 :]


def load(path: Path) -> tuple[TrainState, Header]:
    """The state and header of a checkpoint; CheckpointError unless every leaf is exactly the one its header's model has."""
    header, leaves, body = read_header(path)
    try:
        skeleton = eqx.filter_eval_shape(
            init_state, header.config, len(header.vocabulary), header.config.seed
        )
    except Exception as error:
        raise CheckpointError(f"{path}: its configuration makes no model ({error})") from error
    expected = describe_leaves(skeleton)
    if leaves != expected:
        found, wanted = ([tuple(map(str, leaf)) for leaf in table] for table in (leaves, expected))
        odd = next((leaf for leaf in wanted if leaf not in found), None) or next(
            (leaf for leaf in found if leaf not in wanted), ("order of leaves",)
        )
        raise CheckpointError(
            f"{path}: its leaves are not those of its configuration: {' '.join(odd)}"
        )
    size = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in expected)
    if size > len(body):
        raise CheckpointError(
            f"{path}: its header promises {size:,} bytes of leaves, the file has {len(body):,}"
        )
    file = io.BytesIO(body)
    paths, structure = jax.tree_util.tree_flatten_with_path(skeleton)
    read = []
    for leaf_path, leaf in paths:
        try:
            read.append(_read_leaf(file, leaf))
        except (
            Exception
        ) as error:  # numpy parses a leaf's header as Python literals: whatever that raises
            name = jax.tree_util.keystr(leaf_path).lstrip(".")
            raise CheckpointError(f"{path}: its leaf {name} cannot be read ({error})") from error
    if extra := len(file.read()):
        raise CheckpointError(f"{path}: holds {extra:,} bytes behind its last leaf")
    state = jax.tree.unflatten(structure, read)
    if int(state.step) != header.step:
        raise CheckpointError(
            f"{path}: its header says step {header.step}, its leaves step {int(state.step)}"
        )
    return state, header


def _read_leaf(file: io.BytesIO, leaf: Any) -> Array | Any:
    """One array, checked against the expected shape and dtype before its bytes are read."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read(file)
    if (shape, dtype, fortran_order) != (leaf.shape, np.dtype(leaf.dtype), False):
        raise ValueError(f"holds a leaf {dtype} {shape} where {leaf.dtype} {leaf.shape} belongs")
    data = file.read(dtype.itemsize * math.prod(shape))
    return jnp.array(np.frombuffer(data, dtype).reshape(shape))


def open_run(run: str | None, which: Which) -> tuple[Path, TrainState, Header]:
    """(directory, state, header) of a checkpoint of the named run, or of the newest; ConfigError if there is none."""
    if run is None:
        pattern = f"**/checkpoints/{which.name}.eqx"
        found = [path for root in ("outputs", "multirun") for path in Path(root).glob(pattern)]
        require(
            bool(found),
            "run: there is none in outputs/ or multirun/; train one with main.py, or write run=DIR",
        )
        path = max(found, key=lambda path: path.stat().st_mtime)
    else:
        path = Path(run) / "checkpoints" / f"{which.name}.eqx"
        require(Path(run).is_dir(), f"run={run}: there is no such directory")
        require(path.is_file(), f"run={run}: has no checkpoint {path.relative_to(run)}")
    try:
        return path.parents[1], *load(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
