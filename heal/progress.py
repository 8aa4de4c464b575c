"""How a method says how far it is: a plain callable, so that no front end is needed."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, int, int], None]


def quiet(description: str, done: int, total: int) -> None:
    """Say nothing."""
