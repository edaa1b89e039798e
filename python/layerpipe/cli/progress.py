"""The live progress bar."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerpipe.cli.training import Step


class TrainingBar:
    """Loss, accuracy, samples per second and the pipe's phase, live in a terminal and a line at the end elsewhere."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self._console, self._name = console, name
        self._last: Step | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(f"{name:<16}", total=total, text="fill")

    def step(self, step: Step) -> None:
        self._last = step
        self._progress.update(self._task, completed=step.step, text=self._text(step))

    @staticmethod
    def _text(step: Step) -> str:
        return (
            f"loss {step.loss:6.3f}  accuracy {100 * step.accuracy:5.1f} %  {step.samples_per_s:6.0f} samples/s  "
            f"{step.phase:<6}"
        )

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if not self._console.is_terminal and self._last:
            last = self._last
            self._console.print(
                f"{self._name}: {last.step} minibatches, loss {last.loss:.3f}, {last.samples_per_s:.0f} samples/s"
            )
