"""What a person sees of a run: one header, one line a finished stage, one table, where things are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tasks.progress import Bar, Progress, ProgressFactory, Within, detailed, fitting, quiet

Output = Literal["auto", "plain", "json"]


class Screen:
    """Writes lines as they happen; with `json`, one object at the end and nothing else."""

    def __init__(self, output: Output = "auto") -> None:
        self.output = output
        self.facts: dict[str, Any] = {}

    @property
    def progress(self) -> ProgressFactory:
        """How a stage shows that it lives."""
        if self.output == "json":
            return quiet
        return detailed if self.output == "plain" else fitting

    def say(self, line: str = "") -> None:
        """One line for a person."""
        if self.output != "json":
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def stage(self, name: str, cached: bool, seconds: float, metrics: Mapping[str, float]) -> None:
        """A finished stage: "pruning   cached", "healing   2 m 14 s   alignment 0.61 -> 0.94"."""
        self.remember(name, cached, seconds, metrics)
        took = "cached" if cached else duration(seconds)
        self.say(f"{name:<13} {took:<9} {remark(name, metrics)}".rstrip())

    def remember(self, name: str, cached: bool, seconds: float, metrics: Mapping[str, float]) -> None:
        """A finished stage, for `--json` only: the flow has its own screen, and has shown it."""
        stages = self.facts.setdefault("stages", {})
        stages[name] = {"cached": cached, "seconds": seconds, "metrics": dict(metrics)}

    def note(self, **facts: Any) -> None:
        """Facts for `--json`."""
        self.facts |= facts

    def table(self, evaluation: Path, healers: Sequence[str]) -> None:
        """The table of results, healers in their order."""
        content = json.loads(evaluation.read_text())
        self.note(evaluation=content)
        if self.output == "json":
            return
        from rich.console import Console  # a run that is all cached should not wait for it

        from tasks.summary import table

        console = Console()
        console.print()
        console.print(table(content, healers))
        budget = content["budget"]
        console.print(
            f"budget: keep {budget['asked']:,} of {budget['total']:,} {budget['unit']} asked, {budget['got']:,} got",
            highlight=False,
        )

    def close(self) -> None:
        """With `json`, write what was noted."""
        if self.output == "json":
            sys.stdout.write(json.dumps(self.facts, indent=1, sort_keys=True, default=str) + "\n")


class Series:
    """Many alike, one after another: on a terminal one bar over all of them, else a line for each that is over."""

    def __init__(self, screen: Screen, what: str, total: int) -> None:
        self._screen, self._what, self._total, self._done, self._name = screen, what, total, 0, ""
        is_terminal = screen.output == "auto" and sys.stderr.isatty()
        self._bar = Bar("sweep") if is_terminal else None

    @property
    def progress(self) -> ProgressFactory:
        """How a stage of one of them shows that it lives."""
        bar = self._bar
        if bar is None:
            return self._screen.progress
        return lambda stage, checkpoints: Progress(checkpoints, Within(bar, f"{self._name} {stage}"))

    def begin(self, name: str) -> None:
        """The next one."""
        self._name = name
        if self._bar is not None:
            self._bar.show(self._what, self._done, self._total)
            self._bar.aside(name)

    def end(self, line: str, failed: bool = False) -> None:
        """One is over. Beside a bar only what failed takes a line."""
        self._done += 1
        if self._bar is None:
            width = len(str(self._total))
            self._screen.say(f"{self._done:>{width}}/{self._total} {line}")
            return
        self._bar.show(self._what, self._done, self._total)
        if failed:
            self._bar.say(line)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """2 m 14 s, or 3.1 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02d} s"


def remark(name: str, metrics: Mapping[str, float]) -> str:
    """What is worth saying of a finished stage."""
    if name == "healing" and "alignment_before" in metrics:
        return f"alignment {metrics['alignment_before']:.3f} -> {metrics['alignment_after']:.3f}"
    if name == "allocation":
        return f"keeps {metrics['got']:,.0f} of {metrics['total']:,.0f}, {metrics['asked']:,.0f} asked"
    if name == "evaluation" and "healed_top1" in metrics:
        return f"top-1 {100 * metrics['dense_top1']:.2f} -> {100 * metrics['healed_top1']:.2f} %"
    if name == "evaluation" and "healed_agreement" in metrics:
        return f"agreement with dense {100 * metrics['healed_agreement']:.2f} %"
    return ""
