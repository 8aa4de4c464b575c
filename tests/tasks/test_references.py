"""`python -m tasks`: one stage on what data/stages/*.json refer to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tasks.__main__ as command
from heal.errors import NumericalError
from tasks.references import References
from tasks.runner import Ref
from tasks.store import ArtifactGoneError, Store, StoreError
from tests.tasks import toy
from tests.tasks.conftest import forget
from tests.tasks.toy import STAGES, ToyParams

Log = Callable[[], list[str]]


@pytest.fixture
def store(tmp_path: Path, toy_log: Log) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "stages"


def references(store: Store, folder: Path, params: ToyParams | None = None, **options: Any) -> References:
    return References(params or ToyParams(), store, stages=STAGES, folder=folder, **options)


def test_a_stage_writes_its_reference(store: Store, folder: Path) -> None:
    ref = references(store, folder).run("first")
    assert json.loads((folder / "first.json").read_text()) == {
        "stage": "first",
        "key": ref.key,
        "digest": ref.digest,
        "metrics": {"letters": 4.0},
    }


def test_missing_upstream_stages_are_computed_once(store: Store, folder: Path, toy_log: Log) -> None:
    references(store, folder).run("third")
    assert toy_log() == ["first", "second", "third"]
    assert sorted(path.name for path in folder.iterdir()) == ["first.json", "second.json", "third.json"]


def test_references_are_taken_as_they_are(store: Store, folder: Path, toy_log: Log) -> None:
    for name in STAGES:
        references(store, folder).run(name)
    written = (folder / "third.json").stat().st_mtime_ns
    assert references(store, folder).run("third").cached
    assert toy_log() == ["first", "second", "third"]
    assert (folder / "third.json").stat().st_mtime_ns == written, "an unchanged reference is not written again"


@pytest.mark.parametrize("text", ["{", "[]", '{"stage": "other"}', '{"stage": "first", "key": "x", "digest": "y"}'])
def test_a_reference_that_is_none_is_replaced(text: str, store: Store, folder: Path, toy_log: Log) -> None:
    references(store, folder).run("second")
    (folder / "first.json").write_text(text)
    assert references(store, folder).run("second").cached
    assert json.loads((folder / "first.json").read_text())["metrics"] == {"letters": 4.0}
    assert toy_log() == ["first", "second"]


def test_a_reference_of_other_params_is_not_used(store: Store, folder: Path, toy_log: Log) -> None:
    references(store, folder).run("third")
    ref = references(store, folder, ToyParams().but("first", word="wasps")).run("third")
    assert (store.materialise(ref.digest) / "all.txt").read_text() == "WASPSWASPSWASPS"
    assert toy_log() == ["first", "second", "third"] * 2


def test_a_reference_of_other_code_is_not_used(store: Store, folder: Path, toy_log: Log, tmp_path: Path) -> None:
    references(store, folder).run("third")
    toy.write(tmp_path, first=toy.FILES["first.py"].replace("shout(params", "shout('so ' + params"))
    forget()
    ref = references(store, folder).run("third")
    assert (store.materialise(ref.digest) / "all.txt").read_text() == "SO MOTH" * 3


def lose(store: Store, ref: Ref) -> None:
    shutil.rmtree(store.materialise(ref.digest))


def test_an_upstream_artifact_that_is_gone_is_computed_again(
    store: Store, folder: Path, toy_log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    before = references(store, folder)
    before.run("third")
    for name in ("first", "second"):
        lose(store, before.reference(name))
    ref = references(store, folder, ToyParams().but("third", new=1)).run("third")
    assert toy_log()[3:] == ["first", "second", "third"] and not ref.cached
    assert "the artifact of first is gone" in caplog.text


def test_an_artifact_that_nobody_needs_is_not_missed(store: Store, folder: Path, toy_log: Log) -> None:
    before = references(store, folder)
    before.run("third")
    lose(store, before.reference("first"))
    assert references(store, folder).run("third").cached and len(toy_log()) == 3


def test_an_artifact_that_does_not_stay_is_an_error(
    store: Store, folder: Path, toy_log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    references(store, folder).run("second")

    def lost(digest: str, folder: Path | None = None) -> Path:
        raise ArtifactGoneError(digest, "here")

    monkeypatch.setattr(store, "materialise", lost)
    with pytest.raises(StoreError, match="is not in the store"):
        references(store, folder, ToyParams().but("second", new=1)).run("second")


def test_what_a_name_pointed_to_stays_pinned_until_its_stage_runs(store: Store, folder: Path, toy_log: Log) -> None:
    asked: list[str] = []

    def pointing(digest: str) -> Callable[[], dict[str, str]]:
        return lambda: asked.append(digest) or {"first.word": digest}  # type: ignore[func-returns-value]

    references(store, folder, resolve=pointing("old")).run("third")
    assert references(store, folder, resolve=pointing("new")).run("third").cached
    assert asked == ["old", "old"], "before and after its stage; second and third read no moving name"
    renamed = references(store, folder, ToyParams().but("first", word="wasp"), resolve=pointing("newer"))
    assert not renamed.run("third").cached, "another name is another model"
    assert not references(store, folder, resolve=pointing("newest")).run("first").cached
    assert toy_log() == ["first", "second", "third"] * 2 + ["first"]


class Reported:
    """In place of the road: what main makes of what happens."""

    def __init__(self, outcome: Exception | Ref) -> None:
        self.outcome = outcome

    def __call__(self, stage: str, path: Path | None, overrides: list[str]) -> Ref:
        self.called = (stage, path, overrides)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(("error", "code"), [(StoreError("no room"), 2), (NumericalError("no room"), 1)])
def test_errors_become_exit_codes(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_run", Reported(error))
    assert command.main(["healing"]) == code
    assert capsys.readouterr() == ("", "no room\n")


def test_a_finished_stage_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reported = Reported(Ref("healing", "a" * 64, "b" * 64, {}, True, 3.0))
    monkeypatch.setattr(command, "_run", reported)
    assert command.main(["healing", "-S", "a=1", "-S", "b=2", "--params", "other.yaml"]) == 0
    assert reported.called == ("healing", Path("other.yaml"), ["a=1", "b=2"])
    assert capsys.readouterr().out.split() == ["healing", "cached", "b" * 12]


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["heeling"])
    assert caught.value.code == 2 and "healing" in capsys.readouterr().err


def test_the_healed_bundle_takes_the_place_of_the_last(tmp_path: Path) -> None:
    for number in (1, 2):
        bundle = tmp_path / f"bundle{number}"
        bundle.mkdir()
        (bundle / f"{number}.txt").write_text("weights")
        (bundle / f"{number}.txt").chmod(0o444)
        command.put(bundle, tmp_path / "healed")
    assert [path.name for path in (tmp_path / "healed").iterdir()] == ["2.txt"]
    (tmp_path / "healed" / "2.txt").write_text("a copy of its own")
    assert (tmp_path / "bundle2" / "2.txt").read_text() == "weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle1", "bundle2", "healed"]
