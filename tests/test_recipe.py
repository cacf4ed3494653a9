"""README's recipe for a new attention type, followed to the letter in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, SMALL

EVERYTHING = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import chargpt
from chargpt import cli
from chargpt.checkpoint import load
from chargpt.generate import generate

small = sys.argv[1:]
assert Path(chargpt.__file__).is_relative_to(Path.cwd()), chargpt.__file__
names = {"adamw": [], "muon": ["optimizer.name=muon", "model.match=params", "model.rope=false"]}
for name, options in names.items():
    run = chargpt.train("model.mha_type=fused", *options, *small, run_dir=f"runs/{name}")
    assert run.record.finished and run.record.config.model.mha_type.name == "fused"
state = load(Path("runs/muon/checkpoints/last.eqx"))[0]
square = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape[1:] == (16, 16)]
assert len(square) == 4  # queries, keys, values and outputs have a momentum each

model, tokens = run.model, jnp.arange(7)
logits, cache = model.decode(tokens[:4], model.init_cache(7), 0)
pieces = [logits]
for position in range(4, 7):
    logits, cache = model.decode(tokens[position : position + 1], cache, position)
    pieces.append(logits)
np.testing.assert_allclose(jnp.concatenate(pieces), model(tokens), atol=1e-5)

weights = run.attention_weights("To be")
np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
tools = (
    "sample run=runs/adamw prompt=To num_chars=20",
    "evaluate run=runs/adamw",
    "compare runs out=comparison",
    "inspect runs prompt=To out=attention",
    "export run=runs/adamw file=model.safetensors",
    "import file=model.safetensors run=imported",
    "sample run=imported prompt=To num_chars=20",
)
for line in tools:
    assert cli.run_tool(line.split()) == 0, line
print("everything works")
"""


def test_the_type_of_the_readme_does_everything(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    import_line, case = re.search(
        r"^    (from chargpt\.attention\.fused import \w+)\n\n(        case .*?\n {12}.*?\n)",
        readme,
        re.DOTALL | re.MULTILINE,
    ).groups()
    shutil.copytree(ROOT / "src", tmp_path / "src")
    for folder in ("configs", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    package = tmp_path / "src" / "chargpt"
    (package / "attention" / "fused.py").write_text(source, encoding="utf-8")
    insert(package / "config.py", '    equinox = "equinox"\n', '    fused = "fused"\n')
    registry = package / "attention" / "__init__.py"
    first = "from chargpt.attention.base import AbstractAttention\n"
    insert(registry, first, f"{import_line}\n")
    last = "            return EquinoxAttention(d_model, num_heads, theta, key=key)\n"
    insert(registry, last, case)

    steps = ["trainer.num_steps=4", "trainer.eval_tokens=64", "trainer.sample_chars=10"]
    process = subprocess.run(
        [sys.executable, "-c", EVERYTHING, *SMALL, *steps, "mode=disabled"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
    assert process.stdout.endswith("everything works\n")
    page = (tmp_path / "attention.html").read_text(encoding="utf-8")
    assert "rope=false" in page or "fused" in page


def insert(path: Path, after: str, text: str) -> None:
    """Write `text` behind the one line `after`."""
    source = path.read_text(encoding="utf-8")
    assert source.count(after) == 1, after
    path.write_text(source.replace(after, after + text), encoding="utf-8")
