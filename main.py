"""Train a character-level GPT: `python main.py model.mha_type=selective`.

Every option is a Hydra override; configs/default.yaml names them all.
"""

import sys

import hydra
from omegaconf import DictConfig

from chargpt import cli, config, sweep


@hydra.main(version_base="1.3", config_path="configs", config_name="default")
def main(composed: DictConfig) -> float:
    """Train one model. Returns its best validation loss, for a sweeper to minimise."""
    return cli.single_run(run, composed)


def run(composed: DictConfig) -> float:
    if composed.resume is not None:
        from chargpt.run import resume

        return resume(cli.run_directory(), cli.task_overrides())
    settings = config.parse(composed)
    if config.in_sweep():
        return sweep.run_job(settings, cli.run_directory(), *sweep.runners())
    from chargpt.run import train  # JAX and all that follow: a typo was answered before them

    return train(settings, cli.run_directory())


if __name__ == "__main__":
    sys.exit(cli.report_errors(main, sweep.report, sweep.under_way))
