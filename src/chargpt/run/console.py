"""What a person sees in the terminal: what is trained, on what, how far, how well."""

import contextlib
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

COLUMNS = (  # of an evaluation: metric, title, width, format
    ("trainer/step", "step", 6, ".0f"),
    ("train/loss", "train loss", 10, ".4f"),
    ("val/loss", "val loss", 10, ".4f"),
    ("val/bpc", "bits/char", 9, ".4f"),
    ("val/accuracy", "accuracy", 8, ".2%"),
    ("trainer/seconds", "seconds", 7, ".1f"),
)
MEMBER = "member"  # the title of the names of a population's runs


class RunConsole:
    """Prints to standard output: with a live bar on a terminal, otherwise plain lines."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(highlight=False, soft_wrap=False, quiet=quiet)
        columns = (
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        plain = quiet or not self._console.is_terminal
        self._bar = Progress(
            *columns, console=self._console, transient=True, expand=True, disable=plain
        )
        self._header_due = True

    def say(self, message: str, style: str = "") -> None:
        self._console.print(Text(message, style), soft_wrap=True)

    def show_start(
        self, facts: dict[str, str], parameters: dict[str, int], notes: list[str]
    ) -> None:
        """The facts of the run, a line each, the parameter table, which adds up, and notes."""
        self._show_facts(facts)
        numbers = (Column(name, justify="right") for name in ("number", "share"))
        names = Column("parameters", style="bold")
        table = Table(names, *numbers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        total = sum(parameters.values())
        for name, number in parameters.items():
            table.add_row(name, f"{number:,}", f"{number / total:.1%}")
        table.add_row("total", f"{total:,}", "100.0%", style="bold")
        self._console.print(table)
        self._console.print()
        for text in notes:
            self.say(f"note: {text}")

    def _show_facts(self, facts: Mapping[str, str | None]) -> None:
        columns = Column(style="bold", no_wrap=True), Column(overflow="fold")
        grid = Table.grid(*columns, padding=(0, 2))
        for name, value in facts.items():
            if value is not None:
                grid.add_row(name, Text(value))
        self._console.print(grid)

    @contextlib.contextmanager
    def progress(self, num_steps: int, completed: int) -> Iterator[None]:
        """A live bar around the training loop."""
        self._task = self._bar.add_task("", total=num_steps, completed=completed, status="")
        with self._bar:
            yield

    def show_step(self, metrics: dict[str, int | float], best: float | None) -> None:
        """The newest numbers: on the bar, or as a line."""
        step, loss = int(metrics["trainer/step"]), f"loss {metrics['train/loss']:.4f}"
        speed = f"{metrics['throughput/tokens_per_second']:,.0f} tok/s"
        if self._bar.disable:
            self.say(f"step {step:>6}  {loss}  {speed}")
        best_text = "" if best is None else f"best val {best:.4f}  "
        self._bar.update(self._task, completed=step, status=f"{loss}  {best_text}{speed}")

    def show_evaluation(self, metrics: dict[str, int | float], is_best: bool, sample: str) -> None:
        """A permanent row, and the beginning of what the model writes now, on one line."""
        self._show_row(metrics, is_best)
        if sample:
            line = " / ".join(part for part in sample.split("\n") if part.strip())
            self.say("        " + line[: max(20, self._console.width - 10)], "dim")

    def _show_row(
        self, metrics: dict[str, int | float], is_best: bool, title: str = "", name: str = ""
    ) -> None:
        """COLUMNS of an evaluation, under their titles, perhaps with a first one."""
        if self._header_due:
            titles = "   ".join(f"{text:>{width}}" for _, text, width, _ in COLUMNS)
            self.say(title + titles, "bold")
            self._header_due = False
        cells = (f"{metrics[key]:{width}{form}}" for key, _, width, form in COLUMNS)
        self.say(name + "   ".join(cells) + ("  best" if is_best else ""))

    def show_end(
        self, facts: dict[str, str | None], sample: str, commands: dict[str, str | None]
    ) -> None:
        """The sampled text, the result, and what to type next, except what is None."""
        if sample:
            self._console.rule("sampled text")
            self._console.print(Text(sample.strip()))
        self._console.rule("result")
        self._show_facts(facts)
        self._console.rule("next")
        for purpose, command in commands.items():
            if command is not None:
                self.say(f"# {purpose}", "dim")
                self.say(command)


class MemberConsole(RunConsole):
    """What a person sees of one run of a population: a line when there is something to know.

    All members share the bar of `population`.
    """

    def __init__(self, population: "PopulationConsole", name: str):
        self._population, self._name = population, name

    def begin(self, step: int) -> None:
        """Its run is at `step`."""
        self._population.steps[self._name] = step

    def say(self, message: str, style: str = "") -> None:
        self._population.say(f"{self._name}: {message}", style)

    def show_start(
        self, facts: dict[str, str], parameters: dict[str, int], notes: list[str]
    ) -> None:
        self._population.show_start(facts, parameters, notes)

    def show_step(self, metrics: dict[str, int | float], best: float | None) -> None:
        self._population.count(self._name, metrics)

    def show_evaluation(self, metrics: dict[str, int | float], is_best: bool, sample: str) -> None:
        self._population.show_member(self._name, metrics, is_best)

    def show_end(
        self, facts: dict[str, str | None], sample: str, commands: dict[str, str | None]
    ) -> None:
        if facts["stopped"]:
            self.say(f"stopped {facts['stopped']}")


class PopulationConsole(RunConsole):
    """The facts that all members share; a row for each at evaluations, and one bar."""

    def __init__(self, width: int):
        """`width`: that of the members' names."""
        super().__init__()
        self._width, self._shown = max(width, len(MEMBER)), False
        self.steps: dict[str, int] = {}
        self._speeds: dict[str, float] = {}

    def show_start(
        self, facts: dict[str, str], parameters: dict[str, int], notes: list[str]
    ) -> None:
        if not self._shown:
            own = ("options", "writes to")
            common = {name: fact for name, fact in facts.items() if name not in own}
            super().show_start(common, parameters, notes)
        self._shown = True

    def count(self, name: str, metrics: dict[str, int | float]) -> None:
        """Show on the bar that a member has come further."""
        self.steps[name] = int(metrics["trainer/step"])
        self._speeds[name] = metrics["throughput/tokens_per_second"]
        status = f"{sum(self._speeds.values()):,.0f} tok/s"
        self._bar.update(self._task, completed=sum(self.steps.values()), status=status)

    def forget(self, name: str) -> None:
        """A member has left: its speed counts no more."""
        self._speeds.pop(name, None)

    def show_member(self, name: str, metrics: dict[str, int | float], is_best: bool) -> None:
        title, name = (f"{text:<{self._width}}  " for text in (MEMBER, name))
        self._show_row(metrics, is_best, title, name)
