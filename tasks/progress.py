"""How a running stage shows that it lives: a quiet, a plain and a terminal display behind one small class."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Display(Protocol):
    """What a person sees of a stage."""

    def log(self, message: str) -> None: ...

    def say(self, message: str) -> None: ...

    def show(self, description: str, done: int, total: int) -> None: ...

    def close(self) -> None: ...


class Progress:
    """What a stage is given besides its inputs.

    checkpoints: a folder that survives a killed process and is empty on a first attempt.
    fallbacks: what the stage did instead of what was asked; the runner writes it in the manifest.
    saved: called after every saved checkpoint (a remote store takes them along).
    """

    def __init__(
        self, checkpoints: Path, display: Display | None = None, saved: Callable[[], None] | None = None
    ) -> None:
        self.checkpoints = checkpoints
        self.display: Display = display or Quiet()
        self.saved = saved
        self.fallbacks: list[str] = []

    def log(self, message: str) -> None:
        """A detail: one line for a person who asked for more."""
        self.display.log(message)

    def say(self, message: str) -> None:
        """One line that everybody sees."""
        self.display.say(message)

    def fallback(self, message: str) -> None:
        """One line for a person and for the manifest: a choice the stage made in place of what was asked."""
        self.fallbacks.append(message)
        self.display.say(message)

    def report(self, description: str, done: int, total: int) -> None:
        """`done` of `total` steps are over; the signature that methods of heal call."""
        self.display.show(description, done, total)

    @contextmanager
    def track(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Gives a function that advances by n steps."""
        done = 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            self.report(description, done, total)

        self.report(description, 0, total)
        yield advance

    def checkpoint_saved(self) -> None:
        """Say that a checkpoint is complete, so that another machine can go on from it."""
        if self.saved is not None:
            self.saved()

    def close(self) -> None:
        """Take the display down, also after an exception."""
        self.display.close()


ProgressFactory = Callable[[str, Path], Progress]
"""Stage name and checkpoints folder -> the stage's progress."""


def quiet(stage: str, checkpoints: Path) -> Progress:
    """Says nothing."""
    return Progress(checkpoints)


def detailed(stage: str, checkpoints: Path) -> Progress:
    """Plain lines on stderr, with the details."""
    return Progress(checkpoints, Lines(stage, details=True))


def fitting(stage: str, checkpoints: Path) -> Progress:
    """One bar on a terminal, plain lines elsewhere; no details."""
    return Progress(checkpoints, Bar(stage) if sys.stderr.isatty() else Lines(stage))


class Quiet:
    """Shows nothing."""

    def log(self, message: str) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing: the manifest has it."""

    def show(self, description: str, done: int, total: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """Plain lines on stderr: one every `seconds`; with `details`, also what the stage logs."""

    def __init__(self, stage: str, seconds: float = 10.0, details: bool = False) -> None:
        self.stage, self.seconds, self.details = stage, seconds, details
        self._last = time.monotonic()

    def log(self, message: str) -> None:
        """A line, if details are wanted."""
        if self.details:
            self.say(message)

    def say(self, message: str) -> None:
        """One line on stderr; stdout belongs to results."""
        sys.stderr.write(f"{self.stage:<12} {message}\n")
        sys.stderr.flush()

    def show(self, description: str, done: int, total: int) -> None:
        """A line, if one is due."""
        now = time.monotonic()
        if now - self._last >= self.seconds:
            self._last = now
            self.say(f"{description} {done}/{total}")

    def close(self) -> None:
        """Nothing to take down."""


class Bar:
    """One terminal bar at a time, on stderr."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._rich: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def log(self, message: str) -> None:
        """Nothing: a bar is for people who did not ask for details."""

    def say(self, message: str) -> None:
        """One line above the bar."""
        self._live().console.print(f"{self.stage:<12} {message}", markup=False, highlight=False)

    def show(self, description: str, done: int, total: int) -> None:
        """Move the bar; a new description starts a new one."""
        rich = self._live()
        if description not in self._tasks:
            for task in self._tasks.values():
                rich.remove_task(task)
            self._tasks = {description: rich.add_task(f"{self.stage:<12} {description}", total=total)}
        rich.update(self._tasks[description], completed=done, total=total)

    def aside(self, message: str) -> None:
        """Say in the bar's own line what is under way."""
        for description, task in self._tasks.items():
            self._live().update(task, description=f"{self.stage:<12} {description}  {message}")

    def close(self) -> None:
        """Give the terminal back."""
        if self._rich is not None:
            self._rich.stop()
            self._rich, self._tasks = None, {}

    def _live(self) -> RichProgress:
        if self._rich is None:
            # Imported here: a run that is all cached shows no bar.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._rich = Progress(*columns, console=Console(stderr=True), transient=True)
            self._rich.start()
        return self._rich


class Within:
    """A stage in the line of a bar that counts something larger."""

    def __init__(self, bar: Bar, stage: str) -> None:
        self.bar, self.stage = bar, stage

    def log(self, message: str) -> None:
        """Nothing, as in the bar."""

    def say(self, message: str) -> None:
        """One line above the bar."""
        self.bar.say(f"{self.stage}: {message}")

    def show(self, description: str, done: int, total: int) -> None:
        """The stage and its count, without a bar of its own."""
        self.bar.aside(f"{self.stage} {description} {done}/{total}")

    def close(self) -> None:
        """The bar goes on."""
