"""A sweep of twelve small jobs: what cache and launchers save, and what killing it costs.

    python benchmarks/sweep.py                        # all arms, a quarter of an hour on 2 cores
    python benchmarks/sweep.py 'arms=cached;killed' seed=1    # other moments

Every arm is the same command, six attention types with two seeds each, in a folder of its own.
`cold`: without a compilation cache. `cached`: with one that is empty at the start. `again`: with
what `cached` left there. `side by side, …`: with launcher=joblib. `populations, …`: with
launcher=vmap. `killed`: as `cached`, ended by SIGKILL three times at random moments and started
again each time. Arms must agree in every number of metrics.jsonl but the clock's, in every byte of
the last checkpoint's leaves and in every sample (side by side a job has one core, populations have
other kernels, and XLA adds up in another order: each agree among themselves), and `killed` must not
touch a job that was done. The exit code says whether they do.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arguments import read_all

from chargpt.checkpoint import read_header
from chargpt.compose import slug

ROOT = Path(__file__).parents[1]
SIZES = ["model.d_model=64", "model.num_layers=2", "trainer.num_steps=300"]
SIZES += [
    "trainer.log_every=50",
    "trainer.eval_every=150",
    "trainer.checkpoint_every=50",
    "trainer.eval_tokens=8192",
]
JOBS = [
    "model.mha_type=standard,selective,mqa,gqa,mla,equinox",
    "seed=0,1",
    "trainer.num_devices=1",
]
CLOCKS = ("trainer/seconds", "throughput/tokens_per_second", "throughput/mfu")
KILLS = 3
ARMS = {  # launcher, cache
    "cold": (None, None),
    "cached": (None, "one"),
    "again": (None, "one"),
    "side by side, cold": ("joblib", None),
    "side by side, cached": ("joblib", "two"),
    "populations, cold": ("vmap", None),
    "killed": (None, "three"),
}


def start(folder: Path, launcher: str | None, cache: Path | None) -> subprocess.Popen[bytes]:
    settings = [*SIZES, *JOBS, "mode=disabled", f"hydra.sweep.dir={folder}"] + (
        [f"launcher={launcher}"] if launcher else []
    )
    keep = (
        {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        if cache
        else {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    )
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), "--multirun", *settings],
            env=os.environ | keep,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run(folder: Path, launcher: str | None = None, cache: Path | None = None) -> float:
    """Seconds that the sweep took."""
    begin = time.perf_counter()
    code = start(folder, launcher, cache).wait()
    assert code == 0, f"exit code {code}: {folder.with_suffix('.log')}"
    return time.perf_counter() - begin


def run_killed(folder: Path, cache: Path, longest: float) -> float:
    """As `run`, with SIGKILL at random moments; AssertionError if a finished job is repeated."""
    begin = time.perf_counter()
    for kill in range(KILLS):
        process = start(folder, None, cache)
        time.sleep(random.uniform(8, longest))
        assert process.poll() is None, "the sweep was over before it was to be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
        steps = [
            f"{path.parent.parent.name[:3]}@{read_header(path)[0].step}"
            for path in folder.glob("*/checkpoints/last.eqx")
        ]
        print(
            f"kill {kill + 1}: {len(done)} jobs done; checkpoints {' '.join(sorted(steps))}",
            flush=True,
        )
    run(folder, None, cache)
    changed = [path for path, then in done.items() if path.stat().st_mtime_ns != then]
    assert not changed, f"trained again: {changed}"
    return time.perf_counter() - begin


def results(folder: Path) -> dict[str, str]:
    """What each job came to, as one hash: metrics, leaves of the last checkpoint, samples."""
    found = {}
    for job in sorted(path.parent for path in folder.glob("*/summary.json")):
        lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
        metrics = [
            {name: value for name, value in line.items() if name not in CLOCKS} for line in lines
        ]
        leaves = bytes(read_header(job / "checkpoints" / "last.eqx")[2])
        content = json.dumps(metrics).encode() + leaves + (job / "samples.txt").read_bytes()
        found[job.name] = hashlib.sha256(content).hexdigest()
    return found


def main(arguments: list[str]) -> int:
    chosen = read_all(arguments, arms=";".join(ARMS), seed="0")
    arms = chosen["arms"].split(";")
    random.seed(int(chosen["seed"]))
    work = Path(tempfile.mkdtemp(prefix="chargpt-sweep-"))
    seconds: dict[str, float] = {}
    for arm, (launcher, cache) in ARMS.items():
        if arm not in arms:
            continue
        folder, kept = work / slug(arm), work / f"cache-{cache}" if cache else None
        seconds[arm] = (
            run_killed(folder, kept, seconds["cached"] / 4)
            if arm == "killed"
            else run(folder, launcher, kept)
        )
        print(f"{arm}: {seconds[arm]:.0f} s", flush=True)
    expected = {
        ARMS[arm][0]: results(work / slug(arm)) for arm in reversed(seconds)
    }  # of the launcher's first arm
    print("\n| arm | seconds | of cold | jobs | equal |\n|---|---|---|---|---|")
    same = True
    for arm, time_taken in seconds.items():
        found = results(work / slug(arm))
        wanted = expected[ARMS[arm][0]]
        equal = [name for name in wanted if found.get(name) == wanted[name]]
        ratio = f"{time_taken / seconds['cold']:.2f}" if "cold" in seconds else "-"
        print(
            f"| {arm} | {time_taken:.0f} | {ratio} | {len(found)} | {len(equal)} of {len(wanted)} |"
        )
        same &= len(wanted) == len(equal) == len(found)
    if same:
        shutil.rmtree(work)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
