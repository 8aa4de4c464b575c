"""Stores and the toy pipeline as fixtures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks import keys
from tasks.store import Store
from tests.tasks import toy


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store in a folder, and one that is reached as a bucket is."""
    if request.param == "folder":
        yield Store(str(tmp_path / "store"))
        return
    made = Store(f"memory://{tmp_path.name}/store")
    yield made
    made.place.remove("")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """A store in a folder."""
    return Store(str(tmp_path / "store"))


@pytest.fixture
def toy_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Puts the toy pipeline on the path; gives a function that says which stages ran so far.

    The word of its first stage is a moving name.
    """
    monkeypatch.setattr(keys, "MOVING", ("first.word",))
    log = tmp_path / "ran.log"
    log.touch()
    toy.write(tmp_path)
    monkeypatch.setenv("TOY_LOG", str(log))
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: log.read_text().split()
    forget()


def forget() -> None:
    """Import the toy stages anew next time."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]
