"""How sure of themselves models are, and what several are worth together: a table.

    python main.py --multirun experiment=laptop launcher=joblib seed=1,2,3,4 \
        hydra.sweep.dir=multirun/laptop
    python benchmarks/calibration.py multirun/laptop

Each run's best checkpoint scores the whole validation split, as `chargpt evaluate` does. Then its
logits are divided by a temperature (Guo et al. 2017, arXiv 1706.04599), fitted on one half of the
split and scored on the other, and the reverse: above 1, the model was too sure. Runs that differ
only in their seed are a row; `together` is the mean of the probabilities that they give.
"""

import dataclasses
import functools
import statistics
import sys
from collections.abc import Collection, Sequence

import equinox as eqx
import numpy as np
from arguments import read
from common import machine
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from chargpt.checkpoint import Which, open_run
from chargpt.corpus import make_windows
from chargpt.errors import require
from chargpt.model import GPT
from chargpt.origin import load_text
from chargpt.run.directory import Record, find_runs, read_run
from chargpt.run.evaluate import eval_batch_size
from chargpt.study.arms import Difference, group
from chargpt.study.compare import plus_minus
from chargpt.train import cast, compute_dtype

COLUMNS = ["arm", "seeds", "loss", "minus the first", "temperature", "loss at it"]
COLUMNS += ["minus the first", "together", "temperature", "loss at it"]


def predictions(run: Record) -> tuple[np.ndarray, np.ndarray]:
    """(log probabilities [characters, vocabulary], targets [characters]) of the split."""
    _, state, header = open_run(str(run.path), Which.best)
    text = load_text(header.config, header.vocabulary).val
    windows = make_windows(text, header.config.dataset.seq_len)
    model = cast(state.averaged, compute_dtype(header.config.trainer.precision))
    size, counted = eval_batch_size(windows), windows.weights > 0
    logits = [
        np.asarray(eqx.filter_jit(GPT.batch)(model, windows.inputs[start : start + size]))
        for start in range(0, len(windows.inputs), size)
    ]
    scores = log_softmax(np.concatenate(logits).astype(np.float64), axis=-1)
    return scores[counted], windows.targets[counted]


def losses(scores: np.ndarray, targets: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Nats for each character."""
    return -log_softmax(scores / temperature, axis=-1)[np.arange(len(targets)), targets]


def best_temperature(scores: np.ndarray, targets: np.ndarray) -> float:
    """The one at which the mean loss is lowest."""
    found = minimize_scalar(
        lambda temperature: losses(scores, targets, temperature).mean(),
        bounds=(0.5, 3.0),
        method="bounded",
    )
    return float(found.x)


@dataclasses.dataclass
class Calibration:
    """Mean loss as it is, and with each half of the split at the other half's temperature."""

    loss: float
    temperature: float  # mean of the two
    loss_at_it: float

    @classmethod
    def of(cls, scores: np.ndarray, targets: np.ndarray) -> "Calibration":
        halves = (np.array_split(part, 2) for part in (scores, targets))
        first, second = zip(*halves, strict=True)
        temperatures = [best_temperature(*first), best_temperature(*second)]
        at_them = [losses(*second, temperatures[0]), losses(*first, temperatures[1])]
        return cls(
            float(losses(scores, targets).mean()),
            statistics.fmean(temperatures),
            float(np.concatenate(at_them).mean()),
        )

    @classmethod
    def mean(cls, several: Collection["Calibration"]) -> "Calibration":
        rows = map(dataclasses.astuple, several)
        return cls(*map(statistics.fmean, zip(*rows, strict=True)))

    def cells(self) -> list[str]:
        return [f"{self.loss:.4f}", f"{self.temperature:.2f}", f"{self.loss_at_it:.4f}"]


def minus(ours: dict[int, Calibration], first: dict[int, Calibration], name: str) -> str:
    """Mean difference over the seeds that both have, with half of its 95 % interval."""
    common = [(ours[seed], first[seed]) for seed in ours if seed in first]
    found = Difference.of([getattr(one, name) - getattr(other, name) for one, other in common])
    return plus_minus(found.mean, found.interval, "+")[0] if found else "-"


def together(models: Sequence[np.ndarray], targets: np.ndarray) -> list[str]:
    """Loss of the mean of the models' probabilities, its temperature, the loss at it."""
    if len(models) == 1:
        return 3 * ["-"]
    mean = functools.reduce(np.logaddexp, models) - np.log(len(models))
    return Calibration.of(mean, targets).cells()


def show(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str]) -> None:
    arms, remarks = group([read_run(run) for run in find_runs(read(arguments)[1])])
    print("\n".join([machine(), *remarks, ""]))
    show(COLUMNS)
    print(len(COLUMNS) * "|---" + "|")
    answers, everything = None, []
    first: dict[int, Calibration] = {}
    for arm in arms:
        found = {}
        for seed, run in arm.runs.items():
            found[seed], targets = predictions(run)
            answers = targets if answers is None else answers
            same = np.array_equal(targets, answers)
            require(same, f"{run.path}: has another text than {arms[0].first_run.path}")
        alone = {seed: Calibration.of(scores, answers) for seed, scores in found.items()}
        as_it_is, at_it = (minus(alone, first, name) for name in ("loss", "loss_at_it"))
        first = first or alone
        loss, *tempered = Calibration.mean(alone.values()).cells()
        cells = [arm.name, str(len(alone)), loss, as_it_is, *tempered, at_it]
        show([*cells, *together(list(found.values()), answers)])
        everything += found.values()
    if len(arms) > 1:
        cells = ["all of them", str(len(everything)), *5 * ["-"]]
        show([*cells, *together(everything, answers)])


if __name__ == "__main__":
    main(sys.argv[1:])
