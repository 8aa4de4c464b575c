"""Where regrow keeps its state on this machine: all below one folder, `REGROW_HOME`."""

from __future__ import annotations

import os
from pathlib import Path

from heal.errors import InputError


def home() -> Path:
    """The state folder: `REGROW_HOME`, or `.regrow` in the working directory; always absolute."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get("REGROW_HOME") or ".regrow")))


def refuse_unwritable() -> None:
    """Raise InputError when nothing can be written into the state folder, or where it would be made."""
    if there := blocked(home()):
        raise InputError(f"{there} cannot be written to; set REGROW_HOME to a folder for regrow's state that can")


def blocked(folder: Path) -> Path | None:
    """What keeps a folder from being written into or made, if anything does: itself, or what it would lie in."""
    absolute = folder.absolute()
    there = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else there


def store_url() -> str:
    """Where artifacts are: `REGROW_STORE` (a folder, or any URL that fsspec opens), or `store` in the state folder."""
    return os.environ.get("REGROW_STORE") or str(home() / "store")


def work(key: str) -> Path:
    """The folder in which the stage with this key runs; its checkpoints outlive a killed process."""
    return home() / "work" / key


def cache() -> Path:
    """Local copies of the artifacts of a remote store, by digest; may be deleted at any time."""
    return home() / "cache"


def mlflow_db() -> Path:
    """The registry's SQLite file."""
    return home() / "mlflow.db"


def mlflow_artifacts() -> Path:
    """The registry's files."""
    return home() / "mlartifacts"


def prefect_home() -> Path:
    """Prefect's own state."""
    return home() / "prefect"
