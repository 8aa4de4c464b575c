"""What a person sees of a run: one header, one line a finished stage, one table, where things are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tasks.progress import ProgressFactory, detailed, fitting, quiet

Output = Literal["auto", "plain", "json"]


class Screen:
    """Writes lines as they happen; with `json`, one object at the end and nothing else."""

    def __init__(self, output: Output = "auto") -> None:
        self.output = output
        self.facts: dict[str, Any] = {"stages": {}}

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
        self.say(f"{name:<13} {took:<9} {_remark(name, metrics)}".rstrip())

    def remember(self, name: str, cached: bool, seconds: float, metrics: Mapping[str, float]) -> None:
        """A finished stage, for `--json` only: the flow has its own screen, and has shown it."""
        self.facts["stages"][name] = {"cached": cached, "seconds": seconds, "metrics": dict(metrics)}

    def note(self, **facts: Any) -> None:
        """Facts for `--json`."""
        self.facts |= facts

    def table(self, evaluation: Path) -> None:
        """The table of results."""
        content = json.loads(evaluation.read_text())
        self.note(evaluation=content)
        if self.output == "json":
            return
        from rich.console import Console  # a run that is all cached should not wait for it

        from tasks.summary import table

        console = Console()
        console.print()
        console.print(table(content))
        budget = content["budget"]
        console.print(
            f"budget: keep {budget['asked']:,} of {budget['total']:,} {budget['unit']} asked, {budget['got']:,} got",
            highlight=False,
        )

    def close(self) -> None:
        """With `json`, write what was noted."""
        if self.output == "json":
            sys.stdout.write(json.dumps(self.facts, indent=1, sort_keys=True, default=str) + "\n")


def duration(seconds: float) -> str:
    """2 m 14 s, or 3.1 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02d} s"


def _remark(name: str, metrics: Mapping[str, float]) -> str:
    if name == "healing" and "alignment_before" in metrics:
        return f"alignment {metrics['alignment_before']:.3f} -> {metrics['alignment_after']:.3f}"
    if name == "allocation":
        return f"keeps {metrics['got']:,.0f} of {metrics['total']:,.0f}, {metrics['asked']:,.0f} asked"
    if name == "evaluation" and "healed_top1" in metrics:
        return f"top-1 {100 * metrics['dense_top1']:.2f} -> {100 * metrics['healed_top1']:.2f} %"
    return ""
