"""Checkpoints under attack: damage, forgeries with a valid digest, kills at any time, full disks.

Whatever is killed or starved runs in its own process, forked from a nursery: an interpreter that
has imported everything but has not started JAX yet, so that a fork is cheap and safe. Its processes
run the `child_*` functions here.
"""

import copy
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from hypothesis import strategies as st

from chargpt import checkpoint
from chargpt.checkpoint import CheckpointError, Header, keep_as
from chargpt.config import AttentionType, Config
from chargpt.files import write_durably
from chargpt.run.recorder import Recorder
from chargpt.run.resume import load_newest
from chargpt.train import TrainState, init_state

VOCABULARY = "\n abé😀"
DIGEST = 32
TINY = [
    "model.d_model=4",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.d_ff=4",
    "dataset.seq_len=4",
]
TINY += ["optimizer.warmup_steps=1", "trainer.num_steps=100"]
SECONDS_TO_REFUSE = 3.0
MEMORY_TO_REFUSE = 256 << 20


def tiny_config(*overrides: str) -> Config:
    return small_config(*TINY, *overrides)


def random_state(
    config: Config, seed: int = 0, step: int = 7, vocabulary: str = VOCABULARY
) -> TrainState:
    """A state at `step` whose leaves are random bits: infinities and NaNs among them."""
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        data = rng.bytes(leaf.size * leaf.dtype.itemsize)
        return jnp.array(np.frombuffer(data, leaf.dtype).reshape(leaf.shape))

    skeleton = eqx.filter_eval_shape(init_state, config, len(vocabulary), 0)
    return at_step(jax.tree.map(fill, skeleton), step)


def at_step(state: TrainState, step: int) -> TrainState:
    """`state` with `step` as its counter and embedding, which shows a mixture of two saves."""
    embedding = jnp.array(np.full(state.model.embedding.shape, step, np.float32))
    values = (jnp.array(np.int32(step)), embedding)
    return eqx.tree_at(lambda s: (s.step, s.model.embedding), state, values)


def make_header(config: Config, **changes: Any) -> Header:
    fields = dict(
        vocabulary=VOCABULARY,
        corpus_sha256="0f" * 32,
        step=7,
        seconds=0.1 + 0.2,
        best_val_loss=1 / 3,
        best_step=5,
    )
    fields |= dict(
        config=config,
        versions={"jax": "0.10.2"},
        record_sizes={"metrics.jsonl": 1000, "samples.txt": 0},
    )
    return Header(**fields | changes)


def assert_same_bits(found: TrainState, expected: TrainState) -> None:
    """Same structure, paths, dtypes, shapes and bits, leaf for leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert checkpoint.describe_leaves(found) == checkpoint.describe_leaves(expected)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b), jax.tree_util.keystr(path)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def refusal(path: Path) -> str:
    """The one line with which the file at `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and text.isprintable(), text
    return text.removeprefix(f"{path}: ")


# ---- forgeries


class Parts:
    """A checkpoint taken apart: header fields and leaves, to be changed and signed again."""

    def __init__(self, data: bytes):
        line, body = data[:-DIGEST].split(b"\n", 1)
        self.fields: dict[str, Any] = json.loads(line)
        self.line: bytes | None = None  # the whole header, in place of `fields`
        self.leaves: list[bytes] = []
        file = io.BytesIO(body)
        for _ in self.fields["leaves"]:
            begin = file.tell()
            np.load(file)
            self.leaves.append(body[begin : file.tell()])
        assert b"".join(self.leaves) == body

    def set(self, name: str, value: Any) -> "Parts":
        *groups, last = name.split(".")
        fields = self.fields
        for group in groups:
            fields = fields[group]
        fields[last] = value
        return self

    def index(self, path: str) -> int:
        return [leaf[0] for leaf in self.fields["leaves"]].index(path)

    def content(self) -> bytes:
        line = json.dumps(self.fields).encode() if self.line is None else self.line
        return line + b"\n" + b"".join(self.leaves)

    def write(self, path: Path) -> Path:
        return write_forged(path, self.content())


def write_forged(path: Path, content: bytes) -> Path:
    path.write_bytes(content + hashlib.sha256(content).digest())
    return path


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact checkpoint of about ten thousand bytes. Tests damage copies of it."""
    path = tmp_path_factory.mktemp("tiny") / "last.eqx"
    config = tiny_config()
    checkpoint.save(path, random_state(config), make_header(config))
    return path


@pytest.fixture
def parts(tiny_file: Path) -> Parts:
    return Parts(tiny_file.read_bytes())


# ---- saved and loaded


def test_every_bit_of_the_state_is_restored(mha_type: AttentionType, tmp_path: Path):
    config = tiny_config(f"model.mha_type={mha_type.name}", "model.num_layers=2")
    state, header = random_state(config), make_header(config)
    checkpoint.save(tmp_path / "last.eqx", state, header)
    loaded, loaded_header = checkpoint.load(tmp_path / "last.eqx")
    assert_same_bits(loaded, state)
    assert loaded_header == header
    assert [path.name for path in tmp_path.iterdir()] == ["last.eqx"]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "model.activation=swiglu",
            "model.norm=layernorm",
            "model.norm_position=post",
            "model.rope=false",
        ],
        [
            "model.tie_embeddings=true",
            "model.learned_positions=true",
            "model.dropout=0.1",
            "model.qk_norm=true",
        ],
        [
            "model.mha_type=mla",
            "model.mla.q_lora_rank=4",
            "optimizer.grad_clip=null",
            "trainer.precision=bfloat16",
        ],
        [
            "model.mha_type=gqa",
            "model.num_kv_heads=1",
            "optimizer.schedule=wsd",
            "model.head_dim=6",
        ],
        ["model.mha_type=equinox", "optimizer.schedule=constant", "model.dropout=0.5"],
        [
            "optimizer.name=muon",
            "optimizer.ema_decay=0.9",
            "model.zero_init=true",
            "model.logit_softcap=15",
        ],
    ],
    ids=" ".join,
)
def test_the_state_is_restored_with_every_option_of_the_model(overrides: list[str], tmp_path: Path):
    config = tiny_config(*overrides)
    state = random_state(config)
    checkpoint.save(tmp_path / "last.eqx", state, make_header(config))
    loaded, header = checkpoint.load(tmp_path / "last.eqx")
    assert_same_bits(loaded, state)
    assert header.config == config


def test_the_optimizer_state_is_in_the_file(tiny_file: Path):
    """Both moments of every parameter and the counters: a resumed run would differ without them."""
    paths = [path for path, _, _ in checkpoint.read_header(tiny_file)[1]]
    parameters = [path.removeprefix("model.") for path in paths if path.startswith("model.")]
    assert "embedding" in parameters and "blocks.attention.q_proj.weight" in parameters
    for moment in ("mu", "nu"):
        moments = [path.split(f".{moment}.")[1] for path in paths if f".{moment}." in path]
        assert moments == parameters
    assert {"step", "skipped", "skipped_in_a_row"} < set(paths)
    assert any(path.startswith("opt_state") and path.endswith("count") for path in paths)


@pytest.mark.parametrize(
    "changes",
    [
        {"best_val_loss": None, "best_step": None, "seconds": 0.0},
        {"vocabulary": "\0\n\r\x1b\"'\\\u2028é\ufeff😀", "versions": {}},
        {"seconds": 1e300, "best_val_loss": 5e-324, "versions": {"jax": "1+local", "chargpt": "ü"}},
    ],
    ids=["nothing evaluated yet", "hard characters", "extreme numbers"],
)
def test_every_field_of_the_header_is_restored(changes: dict[str, Any], tmp_path: Path):
    config = tiny_config("wandb.name='ü $ {x}'", "wandb.tags=[a,'b c']", "wandb.entity=null")
    header = make_header(config, **changes)
    state = random_state(config, vocabulary=header.vocabulary)
    checkpoint.save(tmp_path / "last.eqx", at_step(state, header.step), header)
    assert checkpoint.load(tmp_path / "last.eqx")[1] == header


def test_equinox_alone_reads_the_leaves(mha_type: AttentionType, tmp_path: Path):
    config = tiny_config(f"model.mha_type={mha_type.name}", "model.dropout=0.25")
    state = random_state(config)
    checkpoint.save(tmp_path / "last.eqx", state, make_header(config))
    with open(tmp_path / "last.eqx", "rb") as file:
        assert json.loads(file.readline())["step"] == 7
        # Without the dropout rate of Equinox's attention, which the configuration has
        like = eqx.filter(random_state(config, seed=1), eqx.is_array)
        assert_same_bits(eqx.tree_deserialise_leaves(file, like), eqx.filter(state, eqx.is_array))


def test_saving_replaces_the_file_instead_of_overwriting_it(tiny_file: Path, tmp_path: Path):
    """What a reader has open does not change."""
    config, path = tiny_config(), tmp_path / "last.eqx"
    checkpoint.save(path, random_state(config, step=1), make_header(config, step=1))
    before = path.read_bytes()
    with open(path, "rb") as reader:
        checkpoint.save(path, random_state(config, step=2), make_header(config, step=2))
        assert reader.read() == before
    assert checkpoint.load(path)[1].step == 2


# ---- damage


def test_a_file_cut_short_anywhere_is_refused(tiny_file: Path, tmp_path: Path):
    path = Path(shutil.copy(tiny_file, tmp_path / "cut.eqx"))
    for end in reversed(range(path.stat().st_size)):
        os.truncate(path, end)
        assert "is damaged or incomplete" in refusal(path), end


def test_a_bit_flipped_anywhere_is_refused(tiny_file: Path, tmp_path: Path):
    path = Path(shutil.copy(tiny_file, tmp_path / "flipped.eqx"))
    with open(path, "r+b", buffering=0) as file:
        for offset, byte in enumerate(tiny_file.read_bytes()):
            flipped = byte ^ 1 << random.Random(offset).randrange(8)
            os.pwrite(file.fileno(), bytes([flipped]), offset)
            assert "SHA-256" in refusal(path), offset
            os.pwrite(file.fileno(), bytes([byte]), offset)
    checkpoint.load(path)


def test_bytes_added_before_after_or_inside_are_refused(tiny_file: Path, tmp_path: Path):
    data = tiny_file.read_bytes()
    longer = [b"\0" + data, data + b"\0", data[:5000] + b"\0" + data[5000:], data + data]
    for number, changed in enumerate(longer):
        (tmp_path / f"{number}.eqx").write_bytes(changed)
        assert "SHA-256" in refusal(tmp_path / f"{number}.eqx")


def test_what_is_not_a_file_is_refused(tmp_path: Path):
    assert "cannot be read" in refusal(tmp_path / "missing.eqx")
    (tmp_path / "folder.eqx").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.eqx")


def test_a_forgery_cut_short_anywhere_is_refused(tiny_file: Path, tmp_path: Path):
    """The digest is valid, so the checks of header and leaves must find it."""
    content = tiny_file.read_bytes()[:-DIGEST]
    begin = content.index(b"\n") + 1
    edges = [begin + offset for offset in (-1, 0, 1, 6, 10, 127, 128, 129)] + [len(content) - 1]
    for end in sorted({*range(0, begin, 11), *range(begin, len(content), 311), *edges}):
        refusal(write_forged(tmp_path / "cut.eqx", content[:end]))


# ---- leaves that are not those of the configuration


def test_leaves_in_another_order_are_refused(parts: Parts, tmp_path: Path):
    """Two leaves of one shape, exchanged with their names: Equinox alone would load them."""
    table = parts.fields["leaves"]
    a, b = (parts.index(f"model.blocks.attention.{name}_proj.weight") for name in "qk")
    assert table[a][1:] == table[b][1:]
    table[a], table[b] = table[b], table[a]
    assert "leaves are not those" in refusal(parts.write(tmp_path / "table.eqx"))
    parts.leaves[a], parts.leaves[b] = parts.leaves[b], parts.leaves[a]
    assert "leaves are not those" in refusal(parts.write(tmp_path / "both.eqx"))


def test_leaves_of_different_shapes_exchanged_in_the_payload_are_refused(
    parts: Parts, tmp_path: Path
):
    a, b = parts.index("model.embedding"), parts.index("model.final_norm.weight")
    parts.leaves[a], parts.leaves[b] = parts.leaves[b], parts.leaves[a]
    assert "model.embedding" in refusal(parts.write(tmp_path / "x.eqx"))


@pytest.mark.parametrize(
    "path", ["model.embedding", "opt_state[1][0].nu.blocks.attention.v_proj.weight", "skipped"]
)
def test_a_missing_leaf_is_named(path: str, parts: Parts, tmp_path: Path):
    index = parts.index(path)
    entry, leaf = parts.fields["leaves"].pop(index), parts.leaves[index]
    assert path in refusal(parts.write(tmp_path / "table.eqx"))
    del parts.leaves[index]
    assert path in refusal(parts.write(tmp_path / "both.eqx"))
    parts.fields["leaves"].insert(index, entry)
    refusal(parts.write(tmp_path / "payload.eqx"))
    parts.leaves.insert(index, leaf)
    checkpoint.load(parts.write(tmp_path / "intact.eqx"))


def test_an_extra_leaf_is_named(parts: Parts, tmp_path: Path):
    parts.fields["leaves"].append(["model.backdoor", "float32", [2]])
    assert "model.backdoor" in refusal(parts.write(tmp_path / "table.eqx"))
    parts.leaves.append(npy(np.zeros(2, np.float32)))
    assert "model.backdoor" in refusal(parts.write(tmp_path / "both.eqx"))


def test_an_entry_listed_twice_is_refused(parts: Parts, tmp_path: Path):
    parts.fields["leaves"].append(parts.fields["leaves"][-1])
    parts.leaves.append(parts.leaves[-1])
    assert "leaves are not those" in refusal(parts.write(tmp_path / "x.eqx"))


@pytest.mark.parametrize(
    "extra", [b"\0", b"x" * 1000, b"leaf"], ids=["a byte", "a thousand bytes", "a leaf"]
)
def test_bytes_after_the_last_leaf_are_refused(extra: bytes, parts: Parts, tmp_path: Path):
    parts.leaves.append(npy(np.zeros(2, np.float32)) if extra == b"leaf" else extra)
    refusal(parts.write(tmp_path / "x.eqx"))


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float64", "int32", "object", "complex64"]
)
def test_another_dtype_is_refused_and_its_leaf_named(dtype: str, parts: Parts, tmp_path: Path):
    entry = parts.fields["leaves"][parts.index("model.head.weight")]
    entry[1] = dtype
    assert "model.head.weight" in refusal(parts.write(tmp_path / "table.eqx"))
    entry[1] = "float32"
    if dtype not in ("bfloat16", "object"):
        parts.leaves[parts.index("model.head.weight")] = npy(np.zeros(entry[2], dtype))
        assert "model.head.weight" in refusal(parts.write(tmp_path / "payload.eqx"))


@pytest.mark.parametrize(
    "shape",
    [[], [6], [4, 6], [6, 4, 1], [1, 24], [6, 5], [0, 4], [-6, -4], [6.5, 4], ["6", 4], [None, 4]],
)
def test_another_shape_is_refused_and_its_leaf_named(
    shape: list[Any], parts: Parts, tmp_path: Path
):
    entry = parts.fields["leaves"][parts.index("model.head.weight")]
    assert entry[2] == [6, 4]
    entry[2] = shape
    assert "model.head.weight" in refusal(parts.write(tmp_path / "table.eqx"))
    entry[2] = [6, 4]
    if all(isinstance(size, int) and size >= 0 for size in shape):
        parts.leaves[parts.index("model.head.weight")] = npy(np.zeros(shape, np.float32))
        assert "model.head.weight" in refusal(parts.write(tmp_path / "payload.eqx"))


@pytest.mark.parametrize("number", [0, 1, 3, -1, 10**30, None, "2", [2], {}])
def test_another_format_is_refused_and_named(number: Any, parts: Parts, tmp_path: Path):
    message = refusal(parts.set("format", number).write(tmp_path / "x.eqx"))
    assert "is not of format 2" in message
    del parts.fields["format"]
    assert "is not of format 2" in refusal(parts.write(tmp_path / "none.eqx"))


@pytest.mark.parametrize(
    "name, value", [("model.d_model", 8), ("model.mha_type", "mla"), ("model.num_layers", 2)]
)
def test_a_configuration_of_another_model_is_refused_and_a_leaf_named(
    name: str, value: Any, parts: Parts, tmp_path: Path
):
    message = refusal(parts.set(f"config.{name}", value).write(tmp_path / "x.eqx"))
    assert "its leaves are not those of its configuration: model." in message


def test_a_header_at_another_step_than_its_leaves_is_refused(parts: Parts, tmp_path: Path):
    """Batches follow from the step in the leaves, records and schedule from that in the header."""
    assert "step" in refusal(parts.set("step", 8).write(tmp_path / "x.eqx"))


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "vocabulary",
        "corpus_sha256",
        "step",
        "seconds",
        "versions",
        "leaves",
        "best_step",
        "record_sizes",
    ],
)
def test_a_header_without_a_field_is_refused(name: str, parts: Parts, tmp_path: Path):
    del parts.fields[name]
    assert name in refusal(parts.write(tmp_path / "x.eqx"))


@pytest.mark.parametrize("value", ["text", [], {"a": []}, 1.5, [[1]], None], ids=str)
@pytest.mark.parametrize("name", ["step", "config", "versions", "config.model", "config.seed"])
def test_a_field_of_another_type_is_refused(name: str, value: Any, parts: Parts, tmp_path: Path):
    refusal(parts.set(name, value).write(tmp_path / "x.eqx"))


# ---- hostile contents with a valid digest, within limits of time and memory


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def npy_header(text: str, version: int = 1, claimed: int | None = None) -> bytes:
    """A leaf that begins with this header, true or not, before 1000 zeros."""
    length = (len(text) if claimed is None else claimed).to_bytes(2 * min(version, 2), "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + bytes(1000)


class Canary:
    """Pickles to a command: whoever unpickles it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def first_leaf(leaf: bytes) -> Callable[[Parts, Path], Any]:
    return lambda parts, _: parts.leaves.__setitem__(0, leaf)


def field(name: str, value: Any) -> Callable[[Parts, Path], Any]:
    return lambda parts, _: parts.set(name, value)


def header_line(line: bytes) -> Callable[[Parts, Path], Any]:
    return lambda parts, _: setattr(parts, "line", line)


def with_text(field: bytes) -> Callable[[Parts, Path], Any]:
    """The header with one more field after the others, as text: in JSON the last one counts."""

    def change(parts: Parts, _: Path) -> None:
        parts.line = json.dumps(parts.fields).encode()[:-1] + b", " + field + b"}"

    return change


def with_spaces(parts: Parts, _: Path) -> None:
    parts.line = json.dumps(parts.fields).encode() + b" " * (2 << 20)


def many_batches(parts: Parts, _: Path) -> None:
    parts.fields["config"]["trainer"].update(batch_size=10**12, grad_accum_steps=7)


def all_sizes(parts: Parts, _: Path) -> None:
    """A consistent header: 10^9 layers in the configuration and in the table."""
    parts.set("config.model.num_layers", 10**9)
    for entry in parts.fields["leaves"]:
        entry[2] = [10**9, *entry[2][1:]] if "blocks" in entry[0] else entry[2]


def overflowing_sizes(parts: Parts, _: Path) -> None:
    """Sizes whose product is 0 modulo 2^64, in the configuration and in the table."""
    parts.set("config.model.d_ff", 2**62)
    for entry in parts.fields["leaves"]:
        if "up_proj" in entry[0]:
            entry[2] = [1, 2**62, 4]
        elif "down_proj" in entry[0]:
            entry[2] = [1, 4, 2**62]


def pickled_leaf(parts: Parts, canary: Path) -> None:
    objects = np.array([Canary(canary)] * 24, dtype=object).reshape(6, 4)
    parts.leaves[0] = npy(objects, allow_pickle=True)


def pickled_table(parts: Parts, canary: Path) -> None:
    pickled_leaf(parts, canary)
    parts.fields["leaves"][0][1] = "object"


LEAF = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 4), }"
HOSTILE: dict[str, Callable[[Parts, Path], Any]] = {
    **{f"num_layers={n:.0e}": field("config.model.num_layers", n) for n in (10**9, 10**12, 10**30)},
    **{
        f"d_model={n:.0e}": field("config.model.d_model", n) for n in (10**6, 10**9, 10**12, 10**30)
    },
    **{f"d_ff={n:.0e}": field("config.model.d_ff", n) for n in (10**9, 2**62, 10**30)},
    **{f"num_heads={n:.0e}": field("config.model.num_heads", n) for n in (10**9, 10**12)},
    "batch_size=1e12": many_batches,
    "num_layers=1e400": field("config.model.num_layers", 10**400),
    "num_layers=-1": field("config.model.num_layers", -1),
    "learned positions, seq_len=1e12": lambda parts, _: parts.set(
        "config.model.learned_positions", True
    ).set("config.dataset.seq_len", 10**12),
    "vocabulary of 900,000": field("vocabulary", "a" * 900_000),
    "1e9 layers throughout": all_sizes,
    "sizes that overflow": overflowing_sizes,
    "leaves=null": field("leaves", None),
    "leaves=5": field("leaves", 5),
    "leaves=[5]": field("leaves", [5]),
    "leaves={}": field("leaves", {"a": []}),
    "leaves of deep lists": with_text(b'"leaves": ' + b"[" * 900 + b"]" * 900),
    "100,000 leaves": field("leaves", [["a", "b", []]] * 50_000),
    "a leaf's name of two lines": lambda parts, _: parts.fields["leaves"].append(
        ["a\nb\x1b[2J", "float32", [1]]
    ),
    "two million brackets": header_line(b"[" * 2_000_000),
    "half a million brackets": header_line(b"[" * 500_000),
    "100,000 nested objects": header_line(b'{"a":' * 100_000),
    "a setting's name of two lines": lambda parts, _: parts.fields["config"].update(
        {"a\nb\x1b[2J": 1}
    ),
    "a setting's name of 100,000 characters": lambda parts, _: parts.fields["config"].update(
        {"a" * 100_000: 1}
    ),
    "a field's name of two lines": field("a\nb\x1b[2J", 1),
    "records of a negative size": field("record_sizes", {"metrics.jsonl": -1}),
    "900 nested settings": with_text(b'"config": ' + b'{"a":' * 900 + b"1" + b"}" * 900),
    "a header of 2 MiB": field("vocabulary", "a" * (2 << 20)),
    "2 MiB of spaces": with_spaces,
    "a number of 5,000 digits": with_text(b'"step": ' + b"9" * 5000),
    "no header": header_line(b""),
    "a list for header": header_line(b"[1, 2]"),
    "null for header": header_line(b"null"),
    "a header of random bytes": header_line(bytes(range(11, 256)) * 9),
    "YAML for header": header_line(b"!!python/object/apply:os.mkdir [CANARY]"),
    "pickle for header": header_line(b"\x80\x04cos\nsystem"),
    "a pickled leaf": pickled_leaf,
    "a pickled leaf that the table admits": pickled_table,
    "fortran order": first_leaf(npy(np.asfortranarray(np.ones((6, 4), np.float32)))),
    "big-endian": first_leaf(npy(np.ones((6, 4), ">f4"))),
    "void": first_leaf(npy(np.zeros((6, 4), "V4"))),
    "a structured dtype": first_leaf(npy(np.zeros((6, 4), [("a", "<f4")]))),
    **{
        f"npy {version}: {name}": first_leaf(npy_header(text, version))
        for version in (1, 2, 3)
        for name, text in {
            "2^80 numbers": LEAF.replace("(6, 4)", f"({2**40}, {2**40})"),
            "2^64 numbers": LEAF.replace("(6, 4)", f"({2**32}, {2**32})"),
            "negative shape": LEAF.replace("(6, 4)", "(-6, -4)"),
            "half negative shape": LEAF.replace("(6, 4)", "(-6, 4)"),
            "an object in a structure": LEAF.replace("'<f4'", "[('a', 'O')]"),
            "a dtype of 4 GB": LEAF.replace("'<f4'", "[('a', '<f4', (1073741824,))]"),
            "no dtype": LEAF.replace("'<f4'", "None"),
            "parentheses": "(" * 5000,
            "minus signs": "-" * 9000 + "1",
            "an open string": "{'''",
            "odd indentation": "  x\n y\n",
            "20,000 bytes": "L" * 20_000,
            "a NUL": "\0",
            "a backslash": "\\",
            "code": "__import__('os').mkdir('CANARY')",
            "a shape of 5,000 digits": LEAF.replace("6,", f"{'9' * 5000},"),
        }.items()
    },
    "a leaf's header of 4 GB": first_leaf(npy_header(LEAF, 2, claimed=2**32 - 1)),
    "no leaf at all": lambda parts, _: parts.leaves.clear(),
    "zeros for leaves": lambda parts, _: setattr(parts, "leaves", [bytes(20_000)]),
}


def child_load_all(folder: str, good: str) -> None:
    os.chdir(folder)  # where a relative canary would appear
    checkpoint.load(Path(good))  # JAX has started, with all that it maps
    begin = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (begin + MEMORY_TO_REFUSE, resource.RLIM_INFINITY))

    class TooLong(BaseException):
        pass

    def too_long(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    report = []
    for number in range(len(HOSTILE)):
        start, kind, text = time.perf_counter(), "loaded", ""
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_REFUSE)
        try:
            checkpoint.load(Path(folder) / f"{number}.eqx")
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        report.append({"kind": kind, "text": text[:20_000], "seconds": time.perf_counter() - start})
    Path("report.json").write_text(json.dumps(report))


def test_hostile_files_are_refused_in_one_line_quickly_and_without_memory(
    tiny_file: Path, nursery: "Nursery", tmp_path: Path
):
    """One process reads them all, and may take little more memory than it had before the first."""
    intact = tiny_file.read_bytes()
    for number, change in enumerate(HOSTILE.values()):
        parts = Parts(intact)
        change(parts, tmp_path / "canary")
        write_forged(tmp_path / f"{number}.eqx", parts.content().replace(b"CANARY", b"canary"))
    where, seconds = {"folder": str(tmp_path), "good": str(tiny_file)}, 4 * len(HOSTILE)
    assert nursery.run(child_load_all, seconds=seconds, **where) == 0
    assert not (tmp_path / "canary").exists()
    verdicts = dict(zip(HOSTILE, json.loads((tmp_path / "report.json").read_text()), strict=True))
    assert {name: verdict for name, verdict in verdicts.items() if not is_refusal(**verdict)} == {}


def is_refusal(kind: str, text: str, seconds: float) -> bool:
    one_line = text.isprintable() and len(text) < 2000
    return kind == "CheckpointError" and one_line and seconds < SECONDS_TO_REFUSE


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70_000) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


generated = hypothesis.settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
)


@generated
@hypothesis.given(value=JSON_VALUES, data=st.data())
def test_any_value_anywhere_in_the_header_is_refused_or_harmless(
    tiny_file: Path, value: Any, data: st.DataObject
):
    """The digest is valid. What is not refused has the same leaves."""
    parts = Parts(tiny_file.read_bytes())
    places = list(walk(parts.fields))
    container, key = data.draw(st.sampled_from(places))
    container[key] = copy.deepcopy(value)
    assert_refused_or_same(parts.write(tiny_file.with_name("value.eqx")), tiny_file)


def walk(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value; of a list, its two ends."""
    keys: list[Any] = list(node) if isinstance(node, dict) else []
    if isinstance(node, list) and node:
        keys = list({0, len(node) - 1})
    for key in keys:
        yield node, key
        yield from walk(node[key])


@generated
@hypothesis.given(
    place=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), byte=st.integers(0, 255)
)
def test_any_byte_anywhere_is_refused_or_harmless_even_with_a_valid_digest(
    tiny_file: Path, place: float, in_header: bool, byte: int
):
    """In the header, or in the 128 bytes that describe the first leaf."""
    content = bytearray(tiny_file.read_bytes()[:-DIGEST])
    begin = content.index(b"\n") + 1
    content[int(place * begin) if in_header else begin + int(place * 128)] = byte
    assert_refused_or_same(write_forged(tiny_file.with_name("byte.eqx"), bytes(content)), tiny_file)


def assert_refused_or_same(path: Path, original: Path) -> None:
    try:
        state, _ = checkpoint.load(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    states = (state, checkpoint.load(original)[0])
    found, expected = ([np.asarray(a).tobytes() for a in jax.tree.leaves(s)] for s in states)
    assert found == expected


# ---- data only


@pytest.mark.parametrize(
    "name, value",
    [
        ("config/wandb/name", "${oc.env:CHARGPT_SECRET}"),
        ("config/wandb/entity", "x${oc.env:CHARGPT_SECRET}"),
        ("config/dataset/filepath", "${oc.env:CHARGPT_SECRET}"),
        ("config/seed", "${oc.decode:'1'}"),
        ("config/mode", "${oc.env:CHARGPT_MODE}"),
        ("config/model/mha_type", "${model.norm}"),
        ("config/model", "${oc.env:CHARGPT_SECRET}"),
        ("config", "${oc.env:CHARGPT_SECRET}"),
        ("config/wandb/tags", "${oc.env:CHARGPT_SECRET}"),
        ("config/wandb/tags", ["a", "${oc.env:CHARGPT_SECRET}"]),
        ("config/wandb/tags", [["${oc.env:CHARGPT_SECRET}"]]),
        ("config/wandb/tags", [{"a": "${oc.env:CHARGPT_SECRET}"}]),
        ("config/wandb/tags", {"a": "${oc.env:CHARGPT_SECRET}"}),
        ("config/${oc.env:CHARGPT_SECRET}", 1),
        ("config/_target_", "os.mkdir"),
        ("config/model/_target_", "os.mkdir"),
        ("config/model/mla", {"_target_": "os.mkdir", "_args_": ["canary"]}),
        ("config/wandb", {"_target_": "os.mkdir", "path": "canary"}),
        ("config/defaults", ["experiment: debug"]),
        ("config/hydra", {"run": {"dir": "canary"}}),
        ("config/seed", "!!python/object/apply:os.mkdir ['canary']"),
        ("config/!!python:os.mkdir", ["canary"]),
        ("versions", {"jax": {"_target_": "os.mkdir", "path": "canary"}}),
        ("_target_", "os.mkdir"),
    ],
)
def test_a_configuration_is_data_and_neither_resolved_nor_instantiated(
    name: str, value: Any, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CHARGPT_SECRET", "hunter2")
    monkeypatch.setenv("CHARGPT_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    *groups, last = name.split("/")
    container = parts.fields
    for group in groups:
        container = container[group]
    container[last] = value
    message = refusal(parts.write(tmp_path / "x.eqx"))
    assert "hunter2" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["x.eqx"]


def test_text_that_looks_like_yaml_stays_text(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    name = "!!python/object/apply:os.mkdir ['canary']"
    _, header = checkpoint.load(parts.set("config.wandb.name", name).write(tmp_path / "x.eqx"))
    assert header.config.wandb.name == name
    assert [path.name for path in tmp_path.iterdir()] == ["x.eqx"]


# ---- processes to be killed


class Nursery:
    """Forks processes that run one `child_*` function each, and reports how they ended."""

    def __init__(self, stderr: Path):
        self._stderr = stderr
        path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
        code = f"{path}; import test_checkpoint as t; t.serve()"
        with open(stderr, "w") as file:
            command = [sys.executable, "-W", "ignore", "-c", code]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )

    def start(self, function: Callable[..., None], seconds: int = 60, **arguments: Any) -> int:
        """The process id of a new child; it is ended by SIGALRM after `seconds`."""
        self._process.stdin.write(json.dumps([function.__name__, seconds, arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        """The exit code of the child, or minus the signal that ended it."""
        return int(self._read())

    def run(self, function: Callable[..., None], seconds: int = 60, **arguments: Any) -> int:
        self.start(function, seconds, **arguments)
        code = self.wait()
        assert code != 70, self._stderr.read_text()
        return code

    def _read(self) -> str:
        line = self._process.stdout.readline()
        assert line, self._stderr.read_text()
        return line

    def close(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


def serve() -> None:
    """The nursery's side: fork once for each line of the input."""
    for line in sys.stdin:
        name, seconds, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            try:
                globals()[name](**arguments)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "stderr")
    yield nursery
    nursery.close()


def make_recorder(run_dir: Path, said: list[str]) -> Recorder:
    """A recorder that can only save, with a run that only holds the newest state in `run_dir`.

    Its messages go to `said`.
    """
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    restored = load_newest(run_dir, said.append)
    config = tiny_config() if restored is None else restored[1].config
    recorder = object.__new__(Recorder)
    recorder.run = SimpleNamespace(
        state=random_state(config) if restored is None else restored[0],
        step=0 if restored is None else restored[1].step,
        corpus=SimpleNamespace(tokenizer=SimpleNamespace(vocabulary=VOCABULARY), sha256="0f" * 32),
        seconds=time.perf_counter,
        best_val_loss=None,
        best_step=None,
        program=SimpleNamespace(devices="1 x cpu", dtype=np.dtype(np.float32)),
    )
    recorder.run_dir, recorder.config, recorder.versions = run_dir, config, {}
    recorder.console = SimpleNamespace(say=said.append)
    note_saved(recorder)
    return recorder


def note_saved(recorder: Recorder) -> None:
    with open(recorder.run_dir / "saved", "a") as file:
        file.write(f"{recorder.run.step}\n")


def save_next(recorder: Recorder, *names: str) -> None:
    """One more step, saved under `names`, and only then noted in the file `saved`."""
    run = recorder.run
    run.step += 1
    run.state = at_step(run.state, run.step)
    for name in names:
        recorder._save(name)
    note_saved(recorder)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps_saved(run_dir: Path) -> int:
    """The last step that was loaded or completely saved before the process was killed."""
    noted = run_dir / "saved"
    return int(noted.read_text().split()[-1]) if noted.exists() and noted.read_text() else 0


def assert_newest_is_intact(run_dir: Path) -> int:
    """The step of the newest checkpoint: intact, and not older than the last completed save."""
    said: list[str] = []
    newest = load_newest(run_dir, said.append)
    assert said == []
    saved = steps_saved(run_dir)
    if newest is None:
        assert saved == 0
        return 0
    state, header = newest
    assert header.step in (saved, saved + 1)
    assert int(state.step) == header.step
    assert (np.asarray(state.model.embedding) == header.step).all()
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} <= {
        f"{name}.{kind}" for name in ("last", "previous", "best") for kind in ("eqx", "tmp")
    }
    return header.step


def child_save_forever(run_dir: str) -> None:
    recorder = make_recorder(Path(run_dir), [])
    while True:
        save_next(recorder, *(("last", "best") if recorder.run.step % 3 == 0 else ("last",)))


def child_save_once(
    run_dir: str,
    kill_at: int | None = None,
    largest: int | None = None,
    names: tuple = ("last", "best"),
) -> None:
    """Save one step; die at its `kill_at`-th boundary, or when a file passes `largest` bytes."""
    recorder = make_recorder(Path(run_dir), [])
    if kill_at is not None:
        count = itertools.count()

        def boundary() -> None:
            if next(count) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def between_boundaries(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                boundary()
                result = function(*arguments, **named)
                boundary()
                return result

            return call

        for name in ("fsync", "replace", "link", "unlink", "rename"):
            setattr(os, name, between_boundaries(getattr(os, name)))
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    save_next(recorder, *names)


# ---- SIGKILL


def test_sigkill_at_random_moments_leaves_the_newest_intact(nursery: Nursery, tmp_path: Path):
    rng, reached = random.Random(0), 0
    for _ in range(15):
        before = steps_saved(tmp_path)
        process = nursery.start(child_save_forever, run_dir=str(tmp_path))
        deadline = time.monotonic() + 30
        while steps_saved(tmp_path) <= max(before, reached) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(process, signal.SIGKILL)
        assert nursery.wait() == -signal.SIGKILL
        newest = assert_newest_is_intact(tmp_path)
        assert newest > reached  # the next process continued from there
        reached = newest
    assert nursery.run(child_save_once, run_dir=str(tmp_path)) == 0
    assert assert_newest_is_intact(tmp_path) == reached + 1
    assert files_in(tmp_path / "checkpoints") == ["best.eqx", "last.eqx", "previous.eqx"]


def test_sigkill_at_every_boundary_leaves_the_newest_intact(nursery: Nursery, tmp_path: Path):
    """Before and after every fsync, rename, link and unlink of a save, until none is left."""
    assert nursery.run(child_save_once, run_dir=str(tmp_path)) == 0
    assert nursery.run(child_save_once, run_dir=str(tmp_path)) == 0
    for kill_at in itertools.count():
        before = assert_newest_is_intact(tmp_path)
        code = nursery.run(child_save_once, run_dir=str(tmp_path), kill_at=kill_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert before <= assert_newest_is_intact(tmp_path) <= before + 1
    # Twice each: link, rename of the old file; fsync, rename, fsync of the new one and of the best
    assert kill_at >= 14
    assert assert_newest_is_intact(tmp_path) == before + 1
    assert files_in(tmp_path / "checkpoints") == ["best.eqx", "last.eqx", "previous.eqx"]


def test_sigkill_at_every_boundary_of_the_first_save_leaves_it_intact_or_absent(
    nursery: Nursery, tmp_path: Path
):
    found = []
    for kill_at in itertools.count():
        run_dir = tmp_path / str(kill_at)
        run_dir.mkdir()
        code = nursery.run(child_save_once, run_dir=str(run_dir), kill_at=kill_at, names=("last",))
        found.append(assert_newest_is_intact(run_dir))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1


def test_death_in_the_middle_of_a_write_leaves_the_newest_intact(
    tiny_file: Path, nursery: Nursery, tmp_path: Path
):
    """The kernel ends the process with that many bytes of the new file written."""
    assert nursery.run(child_save_once, run_dir=str(tmp_path), names=("last",)) == 0
    assert nursery.run(child_save_once, run_dir=str(tmp_path), names=("last",)) == 0
    size = (tmp_path / "checkpoints" / "last.eqx").stat().st_size
    # The size of a file varies with the digits of the seconds in its header
    for largest in (0, 1, size // 2, size - 100):
        code = nursery.run(child_save_once, run_dir=str(tmp_path), largest=largest, names=("last",))
        assert code == -signal.SIGXFSZ
        assert (tmp_path / "checkpoints" / "last.tmp").stat().st_size == largest
        assert assert_newest_is_intact(tmp_path) == 2
    assert nursery.run(child_save_once, run_dir=str(tmp_path), names=("last",)) == 0
    assert assert_newest_is_intact(tmp_path) == 3
    assert files_in(tmp_path / "checkpoints") == ["last.eqx", "previous.eqx"]


# ---- a full disk


def child_full_disk(run_dir: str, largest: int) -> None:
    """Try to save while no file may pass `largest` bytes, then save with room; report both."""
    said: list[str] = []
    recorder = make_recorder(Path(run_dir), said)
    last, run = checkpoint.file_of(recorder.run_dir, "last"), recorder.run
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = last.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    errors = []
    for _ in range(2):
        try:
            checkpoint.save(last, at_step(run.state, run.step + 1), recorder._header())
        except OSError as error:
            errors.append(error.errno)
    unsaved = []
    for name in ("last", "best", "last"):
        recorder._save(name)
        unsaved.append(recorder.unsaved)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    names = sorted(path.name for path in last.parent.iterdir())
    report = {"errors": errors, "said": said, "intact": last.read_bytes() == before, "names": names}
    save_next(recorder, "last", "best")
    report |= {"unsaved": [*unsaved, recorder.unsaved]}
    (recorder.run_dir / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("largest", [0, 1, 5000])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    largest: int, nursery: Nursery, tmp_path: Path
):
    assert nursery.run(child_save_once, run_dir=str(tmp_path), names=("last",)) == 0
    assert nursery.run(child_full_disk, run_dir=str(tmp_path), largest=largest) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["errors"]) == 2
    assert report["intact"]
    message = "checkpoint not written (File too large); training continues, the last good one stays"
    assert report["said"] == [message] * 3
    assert report["unsaved"] == ["File too large"] * 3 + [None]
    assert report["names"] == ["last.eqx", "previous.eqx"]
    assert assert_newest_is_intact(tmp_path) == 2  # with room again, the next save works


def test_saving_in_a_missing_folder_is_an_oserror(tmp_path: Path):
    config = tiny_config()
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "gone" / "last.eqx", random_state(config), make_header(config))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_anywhere_leaves_the_old_file_and_no_temporary_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, path = tiny_config(), tmp_path / "last.eqx"
    checkpoint.save(path, random_state(config, step=1), make_header(config, step=1))
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, random_state(config, step=2), make_header(config, step=2))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.eqx"]


def test_file_and_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without the first, a power cut may leave an empty file; without the second, the old one."""
    config, events = tiny_config(), []
    fsync, replace = os.fsync, os.replace

    def note_fsync(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        events.append(("fsync", name, os.fstat(file).st_size if events == [] else 0))
        fsync(file)

    def note_replace(old: Path, new: Path) -> None:
        events.append(("replace", Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    checkpoint.save(tmp_path / "last.eqx", random_state(config), make_header(config))
    size = (tmp_path / "last.eqx").stat().st_size
    assert events == [
        ("fsync", "last.tmp", size),
        ("replace", "last.tmp", "last.eqx"),
        ("fsync", tmp_path.name, 0),
    ]


# ---- a file kept under another name


def test_a_file_kept_under_another_name_survives_the_next_save(tmp_path: Path):
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    write_durably(last, b"one")
    keep_as(last, previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"one", b"one")
    write_durably(last, b"two")
    assert (last.read_bytes(), previous.read_bytes()) == (b"two", b"one")
    keep_as(last, previous)
    assert (last.read_bytes(), previous.read_bytes()) == (b"two", b"two")
    assert files_in(tmp_path) == ["last.eqx", "previous.eqx"]


def test_keeping_twice_without_a_save_between_leaves_no_temporary_file(tmp_path: Path):
    """rename() between two names of one file silently does nothing."""
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    write_durably(last, b"one")
    keep_as(last, previous)
    keep_as(last, previous)
    assert files_in(tmp_path) == ["last.eqx", "previous.eqx"]


def test_keeping_works_if_a_kill_left_a_temporary_file(tmp_path: Path):
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    write_durably(last, b"one")
    (tmp_path / "previous.tmp").write_bytes(b"left behind")
    keep_as(last, previous)
    assert previous.read_bytes() == b"one"
    assert files_in(tmp_path) == ["last.eqx", "previous.eqx"]


def test_a_filesystem_without_hard_links_gets_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    last, previous = tmp_path / "last.eqx", tmp_path / "previous.eqx"
    for content in (b"one", b"two"):
        write_durably(last, content)
        keep_as(last, previous)
        assert (last.read_bytes(), previous.read_bytes()) == (content, content)
    assert files_in(tmp_path) == ["last.eqx", "previous.eqx"]
