"""What artifacts and reports call a source of models or images."""

from __future__ import annotations

from pathlib import Path

PLACES = ("file", "bundle", "imagefolder", "parquet")


def public(source: str) -> str:
    """The source, a file or folder without a path of this machine."""
    kind, _, place = source.partition(":")
    return f"{kind}:{Path(place).resolve().name}" if kind in PLACES else source
