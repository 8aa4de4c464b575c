"""The report of a repair that is no training: alignment before and after, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from heal.images import Images
from heal.method import HealingReport, name_of
from heal.states import alignment
from heal.values import ChannelCut, Mask


def reported(
    method: Any,
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    repair: Callable[[], str | tuple[str, ...] | None],
    pruned: Mask | ChannelCut | None = None,
) -> HealingReport:
    """Run `repair`, which may give a note or several, and report what it did to the student. pruned: what was cut."""
    began = time.perf_counter()
    before = alignment(student, teacher, images, pruned)
    said = repair()
    notes = said if isinstance(said, tuple) else () if said is None else (said,)
    after = alignment(student, teacher, images, pruned)
    seconds = time.perf_counter() - began
    return HealingReport(name_of(method), asdict(method), (), before, after, seconds, notes)
