"""What converting heads costs, and how fast training on wins it back (GQA, arXiv 2305.13245).

    python benchmarks/uptraining.py                                  # the sizes of fast_cpu
    python benchmarks/uptraining.py dataset.name=shakespeare folder=/tmp/uptraining

Standard attention is trained for the steps of experiment=fast_cpu, converted to fewer key/value
heads by each kind of pooling (`chargpt convert`), and trained on for a fraction of those steps
(`init_from`), beside the same type trained from scratch for as many steps in all. A seed draws the
same batches in each: differences are taken seed by seed. Arguments other than `folder` and `seeds`
are overrides of every run; runs that are in the folder already are not trained again.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from arguments import read
from common import machine

import chargpt
from chargpt.checkpoint import Which, open_run
from chargpt.cli import run_tool
from chargpt.compose import compose, slug
from chargpt.corpus import load_corpus, make_windows
from chargpt.parallel import offer_cpu_devices
from chargpt.run import start
from chargpt.run.evaluate import eval_batch_size, evaluate

EXPERIMENT = ["experiment=fast_cpu", "mode=disabled", "model.match=none"]
KINDS = {
    "gqa, 2 heads": ["model.mha_type=gqa", "model.num_kv_heads=2"],
    "mqa": ["model.mha_type=mqa"],
}
FRACTIONS = (0.01, 0.05, 0.1)
# Lower than the recipe's, so that a model does not forget what it knows
GENTLE = ["optimizer.learning_rate=1e-3", "optimizer.adam_learning_rate=2e-3"]


def main(arguments: Sequence[str]) -> None:
    chosen, others = read(arguments, folder="multirun/uptraining", seeds="0,1,2")
    common = [*EXPERIMENT, *others]
    offer_cpu_devices()
    folder, seeds = Path(chosen["folder"]), chosen["seeds"].split(",")
    config = compose((*common, "model.mha_type=standard"))
    num_steps = config.trainer.num_steps
    windows = make_windows(load_corpus(config.dataset).val, config.dataset.seq_len)

    def trained(name: str, seed: str, *overrides: str) -> float:
        """Final validation loss of a run, trained unless it is there already."""
        run_dir = folder / slug(f"{name}-{seed}")
        if (run_dir / "metrics.jsonl").exists() and not (run_dir / "summary.json").exists():
            start.resume(run_dir, [])
        elif not (run_dir / "summary.json").exists():
            chargpt.train(*common, f"seed={seed}", *overrides, run_dir=run_dir)
        return float(chargpt.load(run_dir).record.summary["final/val_loss"])

    def converted(kind: str, seed: str, pool: str) -> Path:
        out = folder / slug(f"{kind}-{pool}-converted-{seed}")
        if not out.exists():
            source = f"run={folder / f'standard-{seed}'}"
            how = ["checkpoint=last", f"pool={pool}", *KINDS[kind]]
            assert run_tool(["convert", source, f"out={out}", *how]) == 0
        return out

    def scored(run_dir: Path) -> float:
        model = open_run(str(run_dir), Which.best)[1].averaged
        return float(evaluate(model, windows, eval_batch_size(windows), None)["val/loss"])

    rows: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        base = ["model.mha_type=standard"]
        rows.setdefault(("standard", f"{num_steps} steps"), []).append(
            trained("standard", seed, *base)
        )
        for kind, options in KINDS.items():
            longest = num_steps + round(max(FRACTIONS) * num_steps)
            scratch = f"from scratch, {longest} steps"
            loss = trained(f"{kind}-scratch", seed, *options, f"trainer.num_steps={longest}")
            rows.setdefault((kind, scratch), []).append(loss)
            for pool in ("mean", "first", "random"):
                origin = converted(kind, seed, pool)
                rows.setdefault((kind, f"{pool}, converted"), []).append(scored(origin))
                for fraction in FRACTIONS if pool == "mean" else ():
                    steps = max(1, round(fraction * num_steps))
                    lasts = [f"trainer.num_steps={steps}", f"init_from={origin}", *GENTLE]
                    name = f"{pool}, {steps} steps more ({fraction:.0%})"
                    loss = trained(f"{kind}-{pool}-{steps}", seed, *options, *lasts)
                    rows.setdefault((kind, name), []).append(loss)
    print(f"\n{machine()}, {jax.device_count()} devices; {' '.join(common)}\n")
    print(f"| type | how | seeds {', '.join(seeds)} | mean | minus scratch |")
    print(5 * "|---" + "|")
    for (kind, how), losses in rows.items():
        scratch = next((v for (k, h), v in rows.items() if k == kind and "scratch" in h), losses)
        pairs = [own - other for own, other in zip(losses, scratch, strict=True)]
        spread = statistics.stdev(pairs) if len(pairs) > 1 else 0.0
        difference = f"{statistics.mean(pairs):+.4f} ± {spread:.4f}" if losses != scratch else ""
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {kind} | {how} | {shown} | {statistics.mean(losses):.4f} | {difference} |")


if __name__ == "__main__":
    main(sys.argv[1:])
