"""Names: suggestions for those that were misspelled, and the one that leaves a choice open."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from heal.errors import MethodError

AUTO = "auto"
"""In place of a method's name: heal.presets chooses."""


def refuse_unknown(param: str, value: str, known: Iterable[str]) -> None:
    """Raise MethodError unless a method's param is one of the words that it knows."""
    if value not in known:
        raise MethodError(f"{param} = {value!r} is unknown; {nearest(value, known)}")


def nearest(wanted: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?", or the list of what there is (at most eight names)."""
    names = sorted(known)
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
