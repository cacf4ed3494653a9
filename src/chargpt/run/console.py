"""What a person sees in the terminal: who is training, on what, how far, how well. Plain lines where there is no terminal."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class RunConsole:
    """Prints to standard output. The live bar exists on a terminal only."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._header_due = True

    def say(self, message: str) -> None:
        self._console.print(Text(message), soft_wrap=True)

    def show_start(self, facts: dict[str, str], parameters: dict[str, int]) -> None:
        """The facts of the run, a line each, and the parameter table, which adds up."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            grid.add_row(name, escape(value))
        self._console.print(grid)
        total = sum(parameters.values())
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("parameters", style="bold")
        table.add_column("number", justify="right")
        table.add_column("share", justify="right")
        for name, number in parameters.items():
            table.add_row(name, f"{number:,}", f"{number / total:.1%}")
        table.add_section()
        table.add_row("total", f"{total:,}", "100.0%", style="bold")
        self._console.print(table)
        self._console.print()

    @contextlib.contextmanager
    def progress(self, num_steps: int, completed: int) -> Iterator[None]:
        """A live bar around the training loop."""
        if not self._console.is_terminal:
            yield
            return
        columns = (
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, expand=True) as progress:
            self._progress = progress
            self._task = progress.add_task("", total=num_steps, completed=completed, status="")
            try:
                yield
            finally:
                self._progress = None

    def show_step(self, metrics: dict[str, int | float], best: float | None) -> None:
        """The newest numbers: on the bar, or as a line."""
        step = int(metrics["trainer/step"])
        speed = f"{metrics['throughput/tokens_per_second']:,.0f} tok/s"
        if self._progress is None:
            self._console.print(
                f"step {step:>6}  loss {metrics['train/loss']:.4f}  {speed}", soft_wrap=True
            )
            return
        best_text = "" if best is None else f"best val {best:.4f}  "
        status = f"loss {metrics['train/loss']:.4f}  {best_text}{speed}"
        self._progress.update(self._task, completed=step, status=status)

    def show_evaluation(self, metrics: dict[str, int | float], is_best: bool, sample: str) -> None:
        """A permanent row, and the beginning of what the model writes now, on one line."""
        if self._header_due:
            self._console.print(
                "[bold]  step   train loss     val loss   bits/char   accuracy   seconds[/bold]"
            )
            self._header_due = False
        self._console.print(
            f"{int(metrics['trainer/step']):>6}   {metrics['train/loss']:>10.4f}   {metrics['val/loss']:>10.4f}"
            f"   {metrics['val/bpc']:>9.4f}   {metrics['val/accuracy']:>8.2%}   {metrics['trainer/seconds']:>7.1f}"
            + ("  best" if is_best else ""),
            soft_wrap=True,
        )
        if sample:
            line = " / ".join(part for part in sample.split("\n") if part.strip())
            self._console.print(
                Text("        " + line[: max(20, self._console.width - 10)], style="dim"),
                soft_wrap=True,
            )

    def show_end(self, summary: dict[str, Any], sample: str, next_commands: dict[str, str]) -> None:
        """The result, the text, and what to type next."""
        if sample:
            self._console.rule("sampled text")
            self._console.print(Text(sample.strip()))
        self._console.rule("result")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in summary.items():
            grid.add_row(name, escape(value if isinstance(value, str) else f"{value:,}"))
        self._console.print(grid)
        self._console.rule("next")
        for purpose, command in next_commands.items():
            self._console.print(Text(f"# {purpose}", style="dim"), soft_wrap=True)
            self._console.print(Text(command), soft_wrap=True)
