"""Promotion: compare-and-set, a check by loading, a way back, and a ledger of every move."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from tasks import ledger, mlflow_client, promotion, registry, state
from tasks.gate import Gate, Measured, Verdict, judge
from tasks.promotion import ChampionMovedError, PromotionError
from tasks.registry import RegistryError
from tests.tasks.processes import process

pytest_plugins = ["tests.tasks.registries"]

NAME = "tiny-vit"
GATE = Gate(max_drop_dense=0.05, max_drop_champion=0.05, min_agreement=0.9)
PASSED = judge(Measured(images=1, agreement=1.0, bytes=1, macs=1), Gate(min_agreement=0.5))
REJECTED = judge(Measured(images=1, agreement=0.1, bytes=1, macs=1), Gate(min_agreement=0.5))


@pytest.fixture
def registered(home: Path, bundles: dict[str, Path]) -> dict[str, str]:
    """Version numbers: dense (champion), healed, ruined."""
    versions = {"dense": registry.register_dense(bundles["dense"], NAME).version}
    return versions | {name: registry.register(bundles[name], NAME).version for name in ("healed", "ruined")}


def damage(version: str) -> None:
    """Spoil the weights that a version would be served from."""
    source = Path(mlflow_client.client().get_model_version_download_uri(NAME, version).removeprefix("file://"))
    (weights,) = source.rglob("weights.safetensors")
    weights.write_bytes(b"damaged")


def moves() -> list[tuple[str, str | None, str | None]]:
    return [(move.alias, move.before, move.after) for move in ledger.moves(NAME)]


def test_a_good_challenger_becomes_champion(registered: dict[str, str], images: Tensor, labels: Tensor) -> None:
    decision = promotion.ask(NAME, registered["healed"], GATE, images, labels)
    assert decision.promoted and decision.verdict is not None and not decision.rejected
    measured = {criterion.name: criterion.measured for criterion in decision.verdict.criteria}
    assert measured["min_agreement"] >= 0.95 and measured["max_drop_dense"] <= 0.05
    assert registry.aliases(NAME) == {"dense": "1", "champion": "2", "previous": "1"}
    assert decision.move == next(move for move in reversed(ledger.moves(NAME)) if move.alias == "champion")
    assert decision.move.gate == decision.verdict.digest


def test_a_bad_challenger_is_rejected_and_left_to_look_at(
    registered: dict[str, str], images: Tensor, labels: Tensor
) -> None:
    decision = promotion.ask(NAME, registered["ruined"], GATE, images, labels)
    assert decision.rejected and not decision.promoted
    assert "max_drop_dense" in decision.reason
    assert registry.aliases(NAME) == {"dense": "1", "champion": "1", "challenger": "3"}


def test_without_labels_agreement_decides(registered: dict[str, str], images: Tensor) -> None:
    bad = promotion.ask(NAME, registered["ruined"], GATE, images)
    assert bad.verdict is not None and "no labels" in str(bad.verdict)
    assert [criterion.name for criterion in bad.verdict.criteria] == ["min_agreement"]
    assert promotion.ask(NAME, registered["healed"], GATE, images).promoted


def test_costs_are_measured_when_they_are_limited(registered: dict[str, str], images: Tensor, labels: Tensor) -> None:
    gate = Gate(min_agreement=0.5, max_bytes=10**9, max_macs=1, min_speedup=0.01)
    decision = promotion.ask(NAME, registered["healed"], gate, images, labels)
    assert decision.verdict is not None
    found = {criterion.name: criterion for criterion in decision.verdict.criteria}
    assert found["max_bytes"].passed and found["min_speedup"].passed and not found["max_macs"].passed
    assert found["max_macs"].measured > 1 and found["min_speedup"].measured > 0


def test_a_judged_version_is_not_asked_again(registered: dict[str, str], images: Tensor, labels: Tensor) -> None:
    rejected = promotion.ask(NAME, registered["ruined"], GATE, images, labels)
    assert rejected.verdict is not None
    decision = promotion.ask(NAME, registered["ruined"], GATE, images, labels)
    assert decision.verdict is None and decision.rejected
    assert "judged by these limits on these images before" in decision.reason
    elsewhere = promotion.ask(NAME, registered["ruined"], GATE, images, labels, evaluation="of other images")
    assert elsewhere.verdict is not None and elsewhere.verdict.digest != rejected.verdict.digest
    assert promotion.settled(NAME, registered["ruined"], GATE, "of other images") is not None
    lax = Gate(max_drop_dense=1.0, max_drop_champion=1.0, min_agreement=0.0)
    assert promotion.ask(NAME, registered["ruined"], lax, images, labels).promoted


def test_a_schedule_does_not_bring_back_what_was_rolled_back(
    registered: dict[str, str], images: Tensor, labels: Tensor
) -> None:
    assert promotion.ask(NAME, registered["healed"], GATE, images, labels).promoted
    promotion.rollback(NAME)
    assert not promotion.ask(NAME, registered["healed"], GATE, images, labels).promoted
    assert registry.aliases(NAME)["champion"] == "1"
    assert promotion.ask(NAME, registered["healed"], GATE, images, labels, again=True).promoted


def test_two_schedules_do_not_take_turns(registered: dict[str, str], images: Tensor, labels: Tensor) -> None:
    lax = Gate(max_drop_dense=1.0, max_drop_champion=1.0, min_agreement=0.0)
    for name in ("healed", "ruined"):
        assert promotion.ask(NAME, registered[name], lax, images, labels).promoted
    decision = promotion.ask(NAME, registered["healed"], lax, images, labels)
    assert not decision.promoted and "was champion before version 3" in decision.reason
    assert promotion.ask(NAME, registered["healed"], lax, images, labels, again=True).promoted


def test_the_same_run_elsewhere_may_be_faster(
    registered: dict[str, str], images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = promotion.measure

    def while_another_promotes(*arguments: Any) -> Measured:
        measured = measure(*arguments)
        promotion.promote(NAME, registered["healed"], PASSED, expect="1")
        promotion._point(NAME, "challenger", registered["healed"], "asked at the same time")
        return measured

    monkeypatch.setattr(promotion, "measure", while_another_promotes)
    decision = promotion.ask(NAME, registered["healed"], GATE, images, labels)
    assert not decision.promoted and "champion already" in decision.reason
    assert registry.aliases(NAME) == {"dense": "1", "champion": "2", "previous": "1"}


def test_the_champion_is_not_asked(registered: dict[str, str], images: Tensor) -> None:
    decision = promotion.ask(NAME, "1", GATE, images)
    assert "champion already" in decision.reason and not decision.promoted and not decision.rejected


def test_a_champion_that_moved_meanwhile_stops_the_promotion(registered: dict[str, str]) -> None:
    promotion.promote(NAME, "2", PASSED, expect="1")
    before = registry.aliases(NAME)
    with pytest.raises(ChampionMovedError, match="version 2 now, the gate compared with 1"):
        promotion.promote(NAME, "3", PASSED, expect="1")
    assert registry.aliases(NAME) == before


def test_of_two_promotions_at_once_one_is_refused(registered: dict[str, str]) -> None:
    outcomes: list[str] = []

    def attempt(version: str) -> None:
        try:
            outcomes.append(f"promoted {promotion.promote(NAME, version, PASSED, expect='1').after}")
        except ChampionMovedError:
            outcomes.append("refused")

    threads = [threading.Thread(target=attempt, args=(version,)) for version in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [f"promoted {registry.aliases(NAME)['champion']}", "refused"]


def test_a_champion_that_moves_while_the_version_is_tried_stays(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another machine: it has another state folder, so it does not wait for the lock."""
    real = mlflow_client.predict

    def meanwhile(uri: str, images: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        registry.set_alias(NAME, "champion", "3")
        return real(uri, images)

    monkeypatch.setattr(mlflow_client, "predict", meanwhile)
    with pytest.raises(ChampionMovedError, match="is version 3 now, the gate compared with 1"):
        promotion.promote(NAME, "2", PASSED, expect="1")
    assert registry.aliases(NAME)["champion"] == "3"


def test_a_rejected_version_cannot_be_promoted(registered: dict[str, str]) -> None:
    with pytest.raises(PromotionError, match="did not pass the gate"):
        promotion.promote(NAME, "2", REJECTED, expect="1")


def test_a_version_that_does_not_load_is_not_moved(registered: dict[str, str]) -> None:
    promotion.promote(NAME, "3", PASSED, expect="1")
    before, written = registry.aliases(NAME), moves()
    damage("2")
    with pytest.raises(PromotionError, match=r"version 2 of tiny-vit does not serve.*nothing was moved"):
        promotion.promote(NAME, "2", PASSED, expect="3")
    assert registry.aliases(NAME) == before and moves() == written


def fails_by_its_alias(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], NDArray[np.float32]]) -> None:
    """From now on what serves answers so; versions answer as they are."""
    real = mlflow_client.predict

    def predict(uri: str, images: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        return answer() if uri.endswith("@champion") else real(uri, images)

    monkeypatch.setattr(mlflow_client, "predict", predict)


def not_finite() -> NDArray[np.float32]:
    return np.full((1, 10), np.nan, np.float32)


def test_a_champion_that_does_not_serve_is_moved_back(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.promote(NAME, "3", PASSED, expect="1")
    before = registry.aliases(NAME)
    fails_by_its_alias(monkeypatch, not_finite)
    with pytest.raises(PromotionError, match=r"version 2 of tiny-vit does not serve.*champion is version 3 again"):
        promotion.promote(NAME, "2", PASSED, expect="3")
    assert registry.aliases(NAME) == before == {"dense": "1", "champion": "3", "previous": "1"}
    assert moves()[-4:] == [
        ("previous", "1", "3"),
        ("champion", "3", "2"),
        ("champion", "2", "3"),
        ("previous", "3", "1"),
    ]
    assert "version 2 failed: " in ledger.moves(NAME)[-1].reason


def test_an_answer_that_is_not_finite_moves_nothing(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_client, "predict", lambda uri, images: not_finite())
    with pytest.raises(PromotionError, match="finite: False"):
        promotion.promote(NAME, "2", PASSED, expect="1")
    assert registry.aliases(NAME) == {"dense": "1", "champion": "1"}


def test_an_interrupted_check_is_moved_back(registered: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> NDArray[np.float32]:
        assert registry.aliases(NAME)["champion"] == "2"
        raise KeyboardInterrupt

    fails_by_its_alias(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        promotion.promote(NAME, "2", PASSED, expect="1")
    assert registry.aliases(NAME)["champion"] == "1"
    assert promotion.settled(NAME, "2", GATE) is None, "the next run asks again"


def test_a_failed_return_leaves_the_mark_of_a_rollback(
    registered: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion.promote(NAME, "2", PASSED, expect="1")
    promotion.rollback(NAME)
    fails_by_its_alias(monkeypatch, not_finite)
    with pytest.raises(PromotionError, match="does not serve"):
        promotion.promote(NAME, "2", PASSED, expect="1")
    decision = promotion.settled(NAME, "2", GATE)
    assert decision is not None and "was rolled back" in decision.reason


def test_images_of_the_wrong_size_are_no_check_that_passes(registered: dict[str, str]) -> None:
    with pytest.raises(PromotionError, match="does not serve"):
        promotion.promote(NAME, "2", PASSED, np.zeros((1, 3, 8, 8), np.float32), expect="1")
    assert registry.aliases(NAME)["champion"] == "1"


def test_what_was_rolled_back_comes_back_by_name_only(registered: dict[str, str]) -> None:
    promotion.promote(NAME, "2", PASSED, expect="1")
    assert promotion.rollback(NAME).after == "1"
    assert registry.aliases(NAME) == {"dense": "1", "champion": "1", "previous": "2"}
    with pytest.raises(RegistryError, match="the previous champion, version 2, was rolled back"):
        promotion.rollback(NAME)
    assert promotion.rollback(NAME, to="2").after == "2"
    assert promotion.rollback(NAME, to="3").after == "3"
    assert promotion.rollback(NAME, to="2").after == "2", "named, it serves again"


def test_a_schedule_does_not_bring_it_back_over_an_older_champion(
    registered: dict[str, str], images: Tensor, labels: Tensor
) -> None:
    lax = Gate(max_drop_dense=1.0, max_drop_champion=1.0, min_agreement=0.0)
    for name in ("healed", "ruined"):
        assert promotion.ask(NAME, registered[name], lax, images, labels).promoted
    promotion.rollback(NAME, to=registered["dense"])
    decision = promotion.ask(NAME, registered["ruined"], lax, images, labels)
    assert not decision.promoted and "was rolled back" in decision.reason


@pytest.mark.parametrize(("to", "said"), [(None, "no previous champion"), ("1", "champion already"), ("9", "'9'")])
def test_a_rollback_to_nowhere_names_the_versions(registered: dict[str, str], to: str | None, said: str) -> None:
    with pytest.raises(RegistryError, match=rf"{said}.*1, 2, 3"):
        promotion.rollback(NAME, to)


def test_a_rollback_to_what_does_not_load_changes_nothing(registered: dict[str, str]) -> None:
    promotion.promote(NAME, "2", PASSED, expect="1")
    before = registry.aliases(NAME)
    damage("1")
    with pytest.raises(PromotionError, match="does not serve"):
        promotion.rollback(NAME)
    assert registry.aliases(NAME) == before


def test_every_move_is_in_the_ledger_and_on_its_version(registered: dict[str, str]) -> None:
    move = promotion.promote(NAME, "2", PASSED, expect="1")
    assert moves() == [("dense", None, "1"), ("champion", None, "1"), ("previous", None, "1"), ("champion", "1", "2")]
    line = json.loads(ledger.path().read_text().splitlines()[-1])
    assert line.keys() == {"who", "when", "name", "alias", "from", "to", "gate", "reason"}
    assert (line["from"], line["to"], line["gate"], line["who"]) == ("1", "2", PASSED.digest, move.who)
    assert move.when.endswith("+00:00")
    assert json.loads(registry.version_of(f"models:/{NAME}/2").tags["regrow.moved.champion"]) == line


def test_half_a_line_of_a_power_cut_hides_no_move(registered: dict[str, str]) -> None:
    with open(ledger.path(), "a") as file:
        file.write('{"when": "2026-')
    promotion.promote(NAME, "2", PASSED, expect="1")
    assert moves()[-1] == ("champion", "1", "2")
    assert len(moves()) == 4
    assert ledger.moves("another") == []


def test_a_verdict_fits_into_a_tag(registered: dict[str, str], images: Tensor, labels: Tensor) -> None:
    gate = Gate(max_drop_dense=0.123456789, max_drop_champion=0.123456789, min_agreement=0.123456789)
    promotion.ask(NAME, registered["ruined"], gate, images, labels)
    tag = registry.version_of(f"models:/{NAME}/3").tags["regrow.verdict"]
    assert len(tag) < 2000 and json.loads(tag)["passed"] is False


@pytest.mark.slow
def test_processes_that_promote_at_once_leave_one_champion(registered: dict[str, str]) -> None:
    code = f"""
from tasks import promotion
from tasks.gate import Gate, Measured, judge
verdict = judge(Measured(images=1, agreement=1.0, bytes=1, macs=1), Gate(min_agreement=0.5))
try:
    print(promotion.promote({NAME!r}, VERSION, verdict, expect="1").after)
except promotion.ChampionMovedError:
    print("refused")
"""
    racers = [process(code.replace("VERSION", repr(version))) for version in ("2", "3")]
    said = [racer.communicate() for racer in racers]
    assert sorted(out.strip() for out, _ in said) == [registry.aliases(NAME)["champion"], "refused"], said
    assert state.home().exists()


def test_a_verdict_prints_every_criterion() -> None:
    verdict: Verdict = REJECTED
    assert str(verdict).splitlines()[-1] == "rejected"
