"""The whole road as a user walks it: real processes, Prefect's server, a real SQLite registry."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.table import STAGES
from tests.flows.workplace import REGROW, Workplace

AFTER_HEALING = {"healing", "evaluation", "report", "registration"}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace in which `regrow run` has run once."""
    workplace = Workplace.make(tmp_path_factory.mktemp("walked"))
    finished = workplace.run("run", "--json")
    assert finished.code == 0, finished.errors
    assert finished.computed == set(STAGES)
    return workplace


def test_a_second_run_computes_nothing_and_starts_no_server(walked: Workplace) -> None:
    prefect = walked.home / "prefect" / "prefect.db"
    before, began = prefect.stat().st_mtime_ns, time.time()
    finished = walked.run("run", "--json")
    assert finished.code == 0, finished.errors
    assert finished.computed == set()
    assert len(walked.used_since(began)) == len(STAGES), "what it found counts as used"
    assert prefect.stat().st_mtime_ns == before


def test_prefect_saw_every_stage_and_caches_nothing_itself(walked: Workplace) -> None:
    with sqlite3.connect(walked.home / "prefect" / "prefect.db") as database:
        rows = database.execute("select name, state_name, cache_key from task_run").fetchall()
    assert {name for name, _, _ in rows} >= {*STAGES, "promotion"}
    assert {state for _, state, _ in rows} <= {"Completed", "Cached"}
    assert all(key is None for _, _, key in rows)


def test_the_champion_is_the_healed_version_and_serves(walked: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from heal import bundle
    from tasks import mlflow_client, registry

    monkeypatch.setenv("REGROW_HOME", str(walked.home))
    held = registry.aliases("tiny")
    assert held["champion"] != held["dense"]
    assert held["previous"] == held["dense"]
    folder = registry.fetch_bundle("models:/tiny@champion")
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    import torch

    expected = bundle.load(folder)(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(mlflow_client.predict("models:/tiny@champion", images), expected, rtol=1e-5, atol=1e-6)


def test_another_learning_rate_runs_what_depends_on_it_and_says_why(walked: Workplace) -> None:
    override = ("-S", "healing.starfish.lr=3e-4")
    planned = walked.run("plan", *override, "--json").facts["stages"]
    why = {stage["name"]: stage["why"] for stage in planned if not stage["cached"]}
    assert why.keys() == AFTER_HEALING
    assert why["healing"] == ["healing.starfish.lr 0.0006 -> 0.0003"]
    assert "waits for healing" in why["evaluation"]
    finished = walked.run("run", *override, "--json")
    assert finished.code == 0, finished.errors
    assert finished.computed == AFTER_HEALING


def test_what_the_flow_computed_dvcs_stages_find_and_the_reverse(walked: Workplace, tmp_path: Path) -> None:
    found = walked.stage("report")
    assert found.code == 0, found.errors
    assert "cached" in found.output
    reference = json.loads((walked.folder / "data" / "stages" / "healing.json").read_text())
    other = Workplace.make(tmp_path)
    computed = other.stage("healing")
    assert computed.code == 0, computed.errors
    assert json.loads((other.folder / "data" / "stages" / "healing.json").read_text())["digest"] == reference["digest"]
    losses = (other.folder / "data" / "plots" / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,loss,method" and losses[1].startswith("1,0.") and losses[-1].endswith(",starfish")
    finished = other.run("run", "--json")
    assert finished.computed == {"evaluation", "report", "registration"}


def test_latency_compares_registered_models_side_by_side(walked: Workplace) -> None:
    finished = walked.run("latency", "models:/tiny@dense", "bundle:dense", "-b", "2", "--rounds", "3", "--json")
    assert finished.code == 0, finished.errors
    assert finished.facts.keys() >= {"models:/tiny@dense batch 2", "bundle:dense batch 2"}
    assert all(0 < found["low"] <= found["median"] <= found["high"] for name, found in _timed(finished.facts))


def _timed(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, found) for name, found in facts.items() if " batch " in name]


def test_an_adapter_may_lie_in_the_working_directory(tmp_path: Path) -> None:
    workplace = Workplace.make(tmp_path)
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    source = ("-S", "dense.source=adapter:my_network:build", "-S", "dense.adapter_allow=[my_network:build]")
    done = workplace.run("plan", "--json", *source)
    assert done.code == 0, done.errors
    assert done.facts["stages"][0]["name"] == "dense"


def test_history_and_rollback(walked: Workplace) -> None:
    moves = [json.loads(line) for line in walked.run("history", "tiny", "--json").output.splitlines()]
    assert [move["alias"] for move in moves][:2] == ["dense", "champion"]
    before = next(move for move in reversed(moves) if move["alias"] == "champion")
    finished = walked.run("rollback", "tiny")
    assert finished.code == 0, finished.errors
    after = [json.loads(line) for line in walked.run("history", "tiny", "--json").output.splitlines()]
    assert len(after) > len(moves)
    assert after[-1]["alias"] == "champion"
    assert after[-1]["reason"] == "rolled back"
    assert before["to"] != after[-1]["to"]


IN_ROUNDS = {"epochs: 400": "epochs: 200", "method: variance}": "method: variance, variance: {fold_mean: false}}"}


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_healing_goes_on_and_ends_in_the_same_bits(rounds: int, tmp_path: Path) -> None:
    undisturbed, killed = Workplace.make(tmp_path / "a"), Workplace.make(tmp_path / "b")
    for workplace in (undisturbed, killed):
        params = (workplace.folder / "params.yaml").read_text().replace("epochs: 2", "epochs: 400")
        for old, new in (IN_ROUNDS | {"healing:\n": f"healing:\n  rounds: {rounds}\n"}).items() if rounds > 1 else ():
            assert old in params
            params = params.replace(old, new)
        (workplace.folder / "params.yaml").write_text(params)
    assert undisturbed.stage("healing").code == 0
    process = killed.start(sys.executable, "-m", "tasks", "healing")
    _wait_for_checkpoint(killed.home, f"{2 * rounds - 1}-starfish")
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = killed.stage("healing")
    assert again.code == 0, again.errors
    assert "goes on from the checkpoint" in again.errors
    assert "pruning" not in again.output + again.errors
    digests = [
        json.loads((workplace.folder / "data/stages/healing.json").read_text())["digest"]
        for workplace in (undisturbed, killed)
    ]
    assert digests[0] == digests[1]
    assert (killed.folder / "data/healed/weights.safetensors").read_bytes() == (
        undisturbed.folder / "data/healed/weights.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_server_behind(ending: signal.Signals, tmp_path: Path) -> None:
    workplace = Workplace.make(tmp_path)
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()  # a name that users of Prefect like as well
    process = workplace.start(REGROW, "run", "-S", "healing.starfish.epochs=100000")
    try:
        _wait_for_checkpoint(workplace.home)
        assert _servers(workplace.home)
        os.killpg(process.pid, ending)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in errors and "Traceback" not in errors
    _, alive = psutil.wait_procs(_servers(workplace.home), timeout=100)
    assert not alive


def test_two_first_runs_at_once_both_find_a_server(tmp_path: Path) -> None:
    code = "from flows import private_server\nwith private_server.available(): print('answers')"
    workplace = Workplace(tmp_path)
    both = [workplace.start(sys.executable, "-c", code, PREFECT_HOME=str(workplace.home / "prefect")) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=300)
        assert output == "answers\n", errors


def _servers(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "flows.private_server" in process.cmdline() and process.environ().get("REGROW_HOME") == str(home):
                found.append(process)
    return found


def _wait_for_checkpoint(home: Path, healer: str = "1-starfish", seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if list(home.glob(f"work/*/checkpoints/{healer}/starfish.safetensors")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint in {os.fspath(home)} after {seconds} s")
