"""The first ten minutes on a GPU: is fused attention right, and how fast is everything?

    make gpu-bench                                       # writes gpu-bench/
    python benchmarks/gpu_bench.py folder=DIR minutes=9 parts=attention/train-10.7M

Each part is a program of its own, whose output goes to gpu-bench/PART.txt as it comes, so that
nothing measured is lost if the machine is. summary.md has the tables, for docs/results.md. A part
that fails or takes too long is reported, and the next one begins. `rehearse=true` runs tiny sizes
on whatever device there is.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from arguments import read_all

ROOT = Path(__file__).parents[1]
ON_GPU = {"JAX_PLATFORMS": "cuda"}
TINY = "d_model=16 num_heads=2 num_layers=1 seq_len=16 batch_size=4 rounds=1 steps=1"
SIZES = {
    "0.8M": "d_model=128 num_heads=4 num_layers=4 seq_len=64 batch_size=12 rounds=5 steps=100",
    "10.7M": "d_model=384 num_heads=6 num_layers=6 seq_len=256 batch_size=64 rounds=5 steps=50",
    "124M": "d_model=768 num_heads=12 num_layers=12 seq_len=1024 batch_size=16 rounds=3 steps=10",
}


def parts(rehearse: bool, folder: Path) -> dict[str, tuple[list[str], float]]:
    """{name: (command, seconds allowed)}, what is most worth knowing first."""
    tests = ["-m", "pytest", "-n", "0", "tests/test_gpu.py", "-k", "on_the_device", "-rA"]
    found = {"attention": (tests, 90.0)}
    for name, sizes in SIZES.items():
        arms = "standard/PyTorch compile*" if name == "124M" else "*"
        sizes, arms = (TINY, "standard") if rehearse else (sizes, arms)
        found[f"train-{name}"] = ["benchmarks/train.py", *sizes.split(), f"arms={arms}"], 120.0
    tiny = ["trainer.num_steps=2", "model.num_layers=1", "model.d_model=24", "dataset.seq_len=8"]
    tiny += ["trainer.eval_tokens=100", "trainer.sample_chars=0", "model.d_ff=null"]
    tiny += ["optimizer.warmup_steps=null"]
    sizes = ["sizes=0.03M", "members=1/2", "rounds=1"] if rehearse else ["sizes=0.8M/10.7M"]
    found["population"] = ["benchmarks/population.py", *sizes], 90.0
    for recipe in ("nanogpt", "record"):
        run = ["main.py", "mode=disabled", f"hydra.run.dir={folder / recipe}"]
        run += [f"experiment={recipe}", "dataset.name=shakespeare"]
        found[recipe] = run + (tiny if rehearse else []), 120.0
    if not rehearse:  # these have one size
        found["decode"] = ["benchmarks/decode.py"], 60.0
        found["growth"] = ["benchmarks/growth.py", f"figure={folder / 'growth.png'}"], 60.0
    return found


def main(arguments: list[str]) -> None:
    chosen = read_all(arguments, folder="gpu-bench", minutes="9", parts="", rehearse="false")
    rehearse = chosen["rehearse"] == "true"
    folder = Path(chosen["folder"]).resolve()
    found = parts(rehearse, folder)
    # The tests' own choice would be the CPU; without a GPU, JAX ends every part with an error
    environment = dict(os.environ) if rehearse else {"XLA_FLAGS": "", **os.environ, **ON_GPU}
    names = chosen["parts"].split("/") if chosen["parts"] else list(found)
    if unknown := set(names) - set(found):
        sys.exit(f"error: parts={'/'.join(sorted(unknown))}: there are {'/'.join(found)}")
    folder.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + 60 * float(chosen["minutes"]), []
    summary = folder / "summary.md"
    summary.write_text("")
    for name in names:
        command, limit = found[name]
        begin, limit = time.monotonic(), min(limit, end - time.monotonic())
        if limit <= 0:
            ended = "not begun: no time was left"
        else:
            with open(folder / f"{name}.txt", "w") as output:
                try:
                    code = subprocess.run(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        timeout=limit,
                    ).returncode
                    ended = "done" if code == 0 else f"failed with exit code {code}"
                except subprocess.TimeoutExpired:
                    ended = f"cut off after {limit:.0f} s"
        if ended != "done":
            failed.append(name)
        print(f"{name}: {ended}, {time.monotonic() - begin:.0f} s", flush=True)
        text = folder / f"{name}.txt"
        lines = text.read_text().splitlines() if text.exists() else []
        shown = " ".join(word.removeprefix(f"{ROOT}/") for word in command)
        with open(summary, "a") as file:
            table = [line for line in lines if line.startswith("|")] or lines[-12:]
            file.write(f"## {name}: {ended}\n\n`python {shown}`\n\n" + "\n".join(table) + "\n\n")
    print(f"tables: {summary}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
