"""launcher=vmap. Hydra looks for launchers in this package only; chargpt.study.sweep does the work.

Every program that composes with Hydra imports this module, so it imports nothing that is slow.
"""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, configure_log


class PopulationLauncher(BasicLauncher):
    """Jobs as members of populations, each population one XLA program.

    Hydra starts every job as it does without a launcher. Instead of training, the job says what it
    would train; when all have, they train together. `members`: how many at once, at most.
    """

    def __init__(self, members: int | None = None) -> None:
        super().__init__()
        self.members = members

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from chargpt.study import sweep

        assert self.config is not None
        returned = super().launch(job_overrides, initial_job_idx)
        configure_log(self.config.hydra.job_logging)
        losses = sweep.train_gathered([job.return_value for job in returned], self.members)
        for job, loss in zip(returned, losses, strict=True):
            job.return_value = loss
        return returned
