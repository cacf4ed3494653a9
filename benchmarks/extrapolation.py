"""How models cope with longer and shorter contexts than they were trained on: a table and a figure.

    python main.py --multirun experiment=fast_cpu seed=0,1,2 \
        model.positions=rope,sinusoidal,learned,alibi,none hydra.sweep.dir=multirun/positions
    python benchmarks/extrapolation.py multirun/positions figure=docs/extrapolation.png

Each run's best checkpoint scores the whole validation split in windows of every context that it can
read (`chargpt evaluate dataset.seq_len=N`). Runs of the same kind of positions are averaged.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from arguments import read
from common import machine

from chargpt.checkpoint import Which, open_run
from chargpt.config import Config
from chargpt.corpus import make_windows
from chargpt.origin import load_text
from chargpt.run.directory import find_runs
from chargpt.run.evaluate import eval_batch_size, evaluate
from chargpt.study.figures import PAPER, marker, new_figure, to_png

CONTEXTS = [8, 16, 32, 64, 128, 256, 512, 1024]


def losses_of(run: Path) -> tuple[Config, dict[int, float]]:
    """{context: nats per character} of a run."""
    _, state, header = open_run(str(run), Which.best)
    config, tokens = header.config, load_text(header.config, header.vocabulary).val
    table = config.model.has_learned_positions
    longest = config.dataset.seq_len if table else CONTEXTS[-1]
    losses = {}
    for context in (context for context in CONTEXTS if context <= longest):
        windows = make_windows(tokens, context)
        scores = evaluate(
            state.averaged, windows, eval_batch_size(windows), config.trainer.precision
        )
        losses[context] = float(scores["val/loss"])
    return config, losses


def main(arguments: Sequence[str]) -> None:
    chosen, places = read(arguments, figure="")
    found: dict[str, list[dict[int, float]]] = defaultdict(list)
    trained = set()
    for run in find_runs(places):
        config, losses = losses_of(run)
        found[config.model.positions_name].append(losses)
        trained.add(config.dataset.seq_len)
    print(f"{machine()}; trained with contexts of {', '.join(map(str, sorted(trained)))}\n")
    print(f"| positions | runs | {' | '.join(map(str, CONTEXTS))} |")
    print((2 + len(CONTEXTS)) * "|---" + "|")
    figure, (axes,) = new_figure(PAPER, 4.4)
    for number, (kind, runs) in enumerate(found.items()):
        mean = {n: statistics.mean(run[n] for run in runs) for n in runs[0]}
        cells = [f"{mean[n]:.4f}" if n in mean else "" for n in CONTEXTS]
        print(f"| {kind} | {len(runs)} | {' | '.join(cells)} |")
        style = PAPER.style(number) | dict(marker=marker(number), linewidth=1.8, label=kind)
        axes.plot(list(mean), list(mean.values()), **style)
    for context in trained:
        axes.axvline(context, color=PAPER.ink, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONTEXTS, [str(n) for n in CONTEXTS])
    axes.set_xlabel("context, characters (dotted: that of training)")
    axes.set_ylabel("validation loss, nats per character")
    axes.legend(frameon=False)
    if chosen["figure"]:
        Path(chosen["figure"]).write_bytes(to_png(figure))


if __name__ == "__main__":
    main(sys.argv[1:])
