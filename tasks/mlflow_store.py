"""Where the registry is, made ready before MLflow opens it: address, lock, first migration. Imports no MLflow."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from heal.errors import HealError, InputError
from tasks import state
from tasks.addresses import public

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",  # `true`, not 1: MLflow takes no other value
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # it would copy a lock file of the working directory into a model
    "GIT_PYTHON_REFRESH": "quiet",
}


class RegistryError(InputError):
    """The registry, or what was asked of it, is not there."""


class UnreachableError(RegistryError, ConnectionError):
    """The tracking server does not answer; a retry may help."""


def silence() -> None:
    """No phone-home and no chatter from MLflow; what the user has set stays. Call it before importing MLflow."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the SQLite file of the state folder by its absolute path."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state.mlflow_db()}"


def artifact_location(uri: str) -> str | None:
    """Where a new experiment keeps its files: beside the database; None leaves it to the server."""
    if uri.startswith(("http://", "https://")):
        return None
    database = _database(uri)
    folder = state.mlflow_artifacts() if database is None else database.with_name("mlartifacts")
    return folder.as_uri()


def exists(uri: str) -> bool:
    """Whether there is a registry to read from; a server is taken at its word."""
    database = _database(uri)
    return database is None or database.exists()


def require(uri: str) -> None:
    """Raises RegistryError when there is no registry to read from (reading must not make one)."""
    if not exists(uri):
        raise RegistryError(
            f"there is no registry at {_database(uri)}; register a model first (regrow run with registration.name), "
            "or set MLFLOW_TRACKING_URI or REGROW_HOME to the one you mean"
        )


def ready(uri: str) -> None:
    """Make sure that MLflow can open `uri`: a server must answer, a SQLite file must have this version's tables.

    A new file is migrated beside and renamed, by one process at a time: two that migrate one file
    together leave it broken for good. An older file is copied before it is migrated.
    """
    if uri.startswith(("http://", "https://")):
        _reach(uri)
    database = _database(uri)
    if database is None or _migrated(database):
        return
    with locked(database.with_name(f"{database.name}.lock")):
        if not _migrated(database):
            _migrate(database)


@contextmanager
def locked(path: Path, seconds: float = 600) -> Iterator[None]:
    """Hold the lock file at `path`; the system frees it when its holder dies. Raises HealError after `seconds`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise HealError(f"another process has held {path} for {seconds:g} s; wait for it or end it") from error
    try:
        yield
    finally:
        lock.release()


def _database(uri: str) -> Path | None:
    """The file of a SQLite address."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _reach(uri: str) -> None:
    """MLflow itself would retry a mistyped address for minutes."""
    try:
        # Without user and password, which urllib would take for the host.
        urllib.request.urlopen(f"{public(uri).rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return  # somebody answers: a gateway in front of the server may know no such page
    except OSError as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # somebody answers, too; which certificates to trust is MLflow's own setting
        raise UnreachableError(
            f"no MLflow server answers at MLFLOW_TRACKING_URI={public(uri)} ({error}); start it or correct the address"
        ) from error


def _mark(database: Path) -> Path:
    return database.with_name(f"{database.name}.migrated")


def _migrated(database: Path) -> bool:
    mark = _mark(database)
    return database.exists() and mark.exists() and mark.read_text() == metadata.version("mlflow")


def _migrate(database: Path) -> None:
    if database.exists():
        shutil.copy2(database, database.with_name(f"{database.name}.before-{metadata.version('mlflow')}"))
        _upgrade(database)
    else:
        beside = database.with_name(f"{database.name}.new")
        beside.unlink(missing_ok=True)
        _upgrade(beside)
        os.replace(beside, database)
    _mark(database).write_text(metadata.version("mlflow"))


def _upgrade(database: Path) -> None:
    """In a process of its own: migrations change global logging, and MLflow must see the file finished."""
    silence()
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{database}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise RegistryError(
            f"the registry {database} cannot be migrated to MLflow {metadata.version('mlflow')}: "
            f"{''.join(reason)}; move the file away, or use the MLflow that wrote it"
        )
