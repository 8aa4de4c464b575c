"""The registry: versions that are complete or do not exist, bundles without pickle, errors that help."""

from __future__ import annotations

import ast
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from heal import bundle
from heal.architecture import Architecture
from heal.errors import ArchitectureError, InputError
from tasks import ledger, mlflow_client, mlflow_store, registry, state
from tasks.registry import RegistryError
from tests.tasks.processes import process

pytest_plugins = ["tests.tasks.registries"]

NAME = "tiny-vit"

Logits = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]


def logged(version: registry.Version) -> Path:
    """The folder that MLflow keeps of a version."""
    (folder,) = (path.parent for path in state.mlflow_artifacts().rglob("MLmodel"))
    return folder


def test_the_address_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = registry.tracking_uri()
    monkeypatch.chdir(tmp_path)
    assert registry.tracking_uri() == before == f"sqlite:///{state.mlflow_db()}"


def test_a_variable_names_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5999")
    assert registry.tracking_uri() == "http://127.0.0.1:5999"


def test_reading_makes_no_registry() -> None:
    with pytest.raises(InputError, match="there is no registry"):
        registry.resolve(f"models:/{NAME}@dense")
    assert registry.referenced_artifacts() == set()
    assert not state.home().exists()


def test_an_address_without_a_server_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"MLFLOW_TRACKING_URI=http://127\.0\.0\.1:9") as caught:
        registry.resolve(f"models:/{NAME}@dense")
    assert isinstance(caught.value, RegistryError)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/tiny-vip@dense", f"no model 'tiny-vip'.*did you mean {NAME}"),
        (f"models:/{NAME}@chanpion", "no alias 'chanpion'.*champion, dense.*did you mean champion"),
        (f"models:/{NAME}/7", "no version '7'.*has: 1"),
        (f"models:/{NAME}", "names no version; write models:/NAME@ALIAS"),
        (f"models:/{NAME}/latest", "names no version"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(
    uri: str, said: str, home: Path, bundles: dict[str, Path]
) -> None:
    registry.register_dense(bundles["dense"], NAME)
    with pytest.raises(RegistryError, match=said):
        registry.resolve(uri)


def test_an_alias_and_a_number_resolve_to_the_bundle(home: Path, bundles: dict[str, Path]) -> None:
    version = registry.register_dense(bundles["dense"], NAME)
    assert (version.name, version.version, version.uri) == (NAME, "1", f"models:/{NAME}/1")
    for uri in (version.uri, f"models:/{NAME}@dense", f"models:/{NAME}@champion"):
        assert registry.resolve(uri) == bundle.digest(bundles["dense"])


def test_the_same_bundle_is_registered_once_and_says_what_made_it_last(home: Path, bundles: dict[str, Path]) -> None:
    made_of = [{registry.ARTIFACTS: json.dumps({"report": digest})} for digest in ("old", "new")]
    first, again = (registry.register(bundles["dense"], NAME, tags=tags) for tags in made_of)
    assert (first, again.tags[registry.ARTIFACTS]) == (again, made_of[1][registry.ARTIFACTS])
    assert registry.referenced_artifacts() == {"new"}
    assert registry.register(bundles["healed"], NAME).version == "2"


def test_an_unfinished_version_does_not_exist(home: Path, bundles: dict[str, Path]) -> None:
    version = registry.register(bundles["dense"], NAME)
    mlflow_client.client().delete_model_version_tag(NAME, version.version, registry.COMPLETE)
    with pytest.raises(RegistryError, match="no finished regrow version"):
        registry.resolve(version.uri)
    assert registry.register(bundles["dense"], NAME).version == "2"


def test_a_version_says_what_its_caller_tagged(home: Path, bundles: dict[str, Path]) -> None:
    tags = {registry.ARTIFACTS: json.dumps({"healing": "abc", "dense": "def"})}
    assert registry.register(bundles["dense"], NAME, tags=tags).tags.items() >= tags.items()
    assert registry.referenced_artifacts() == {"abc", "def"}


def test_dense_takes_its_alias_and_the_free_place_of_the_champion(home: Path, bundles: dict[str, Path]) -> None:
    registry.register_dense(bundles["dense"], NAME)
    registry.register_dense(bundles["dense"], NAME)
    assert registry.aliases(NAME) == {"dense": "1", "champion": "1"}
    moved = [(move.alias, move.before, move.after) for move in ledger.moves(NAME)]
    assert moved == [("dense", None, "1"), ("champion", None, "1")]


def test_another_dense_model_does_not_take_the_place_that_schedules_read(home: Path, bundles: dict[str, Path]) -> None:
    registry.register_dense(bundles["dense"], NAME)
    with pytest.raises(registry.RegistryError, match="another model than dense"):
        registry.register_dense(bundles["healed"], NAME)
    assert registry.aliases(NAME) == {"dense": "1", "champion": "1"}


@pytest.mark.parametrize("tag", ["/precious", "../../precious", "", "0" * 63])
def test_a_tag_that_is_no_digest_names_no_folder(home: Path, bundles: dict[str, Path], tag: str) -> None:
    registry.register_dense(bundles["dense"], NAME)
    registry.set_tag(NAME, "1", registry.DIGEST, tag)
    with pytest.raises(registry.RegistryError, match="no digest"):
        registry.fetch_bundle(f"models:/{NAME}/1")


def test_a_version_is_logged_in_the_given_run(
    home: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [mlflow_client.client().create_run(mlflow_client.experiment()).info.run_id for _ in range(2)]
    monkeypatch.setenv("MLFLOW_RUN_ID", runs[1])
    versions = [registry.register(bundles["dense"], NAME, run_id=runs[0]), registry.register(bundles["healed"], NAME)]
    found = [mlflow_client.client().get_model_version(NAME, version.version).run_id for version in versions]
    assert found == runs
    assert {mlflow_client.client().get_run(run).info.status for run in runs} == {"RUNNING"}


def test_without_a_run_one_is_made_and_ended(home: Path, bundles: dict[str, Path]) -> None:
    version = registry.register(bundles["dense"], NAME)
    run = mlflow_client.client().get_model_version(NAME, version.version).run_id
    assert run is not None
    assert mlflow_client.client().get_run(run).info.status == "FINISHED"


def test_nothing_of_a_version_is_pickled(home: Path, bundles: dict[str, Path]) -> None:
    folder = logged(registry.register(bundles["dense"], NAME))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {"", ".py", ".json", ".yaml", ".txt", ".md", ".safetensors", ".typed"}
    assert [path for path in files if path.read_bytes()[:1] == b"\x80"] == []
    imported = {name for path in files if path.suffix == ".py" for name in imports(path)}
    assert imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"} == set()


def imports(path: Path) -> Iterator[str]:
    """Top names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_a_version_pins_what_serving_needs(home: Path, bundles: dict[str, Path]) -> None:
    folder = logged(registry.register(bundles["dense"], NAME))
    pinned = (folder / "requirements.txt").read_text().split()
    assert {line.split("==")[0] for line in pinned} == {"mlflow", "torch", "timm", "safetensors", "numpy"}
    assert all("==" in line and "+" not in line for line in pinned)


def test_a_served_model_answers_as_its_bundle(home: Path, bundles: dict[str, Path], logits: Logits) -> None:
    registry.register_dense(bundles["dense"], NAME)
    path, inputs = list(sys.path), np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(mlflow_client.predict(f"models:/{NAME}@champion", inputs), logits("dense", inputs))
    assert mlflow_client.predict(f"models:/{NAME}@champion").shape == (1, 10)
    assert sys.path == path


def test_a_served_model_brings_its_own_code(
    home: Path, bundles: dict[str, Path], logits: Logits, tmp_path: Path
) -> None:
    folder = logged(registry.register(bundles["dense"], NAME))
    inputs = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "inputs.npy", inputs)
    code = f"""
import sys
sys.path = [path for path in sys.path if path != {str(Path(bundle.__file__).parents[1])!r}]
import mlflow.pyfunc, numpy
model = mlflow.pyfunc.load_model({str(folder)!r})
numpy.save("logits.npy", model.predict(numpy.load("inputs.npy")))
import heal
print(heal.__file__)
"""
    served = process(code, tmp_path, PYTHONPATH="", PYTHONSAFEPATH="1")
    out, err = served.communicate()
    assert served.returncode == 0, err
    assert out.strip() == str(folder / "code" / "heal" / "__init__.py")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits("dense", inputs), rtol=1e-5, atol=1e-6)


def test_an_adapter_that_was_allowed_at_registration_is_imported_when_served(
    home: Path, logits: Logits, tmp_path: Path
) -> None:
    recipe = Architecture("adapter", "tests.heal.nets:build", {"name": "vit"})
    model, inputs = recipe.build([recipe.name]), np.zeros((2, 3, 32, 32), np.float32)
    bundle.save(model, tmp_path / "own", architecture=recipe, metadata={"preprocessing": {"size": [32, 32]}})
    with pytest.raises(ArchitectureError, match="allow_adapters"):
        registry.register(tmp_path / "own", NAME)
    version = registry.register(tmp_path / "own", NAME, allow_adapters=[recipe.name])
    np.testing.assert_array_equal(mlflow_client.predict(version.uri, inputs), logits("dense", inputs))


def test_wrong_images_are_refused_by_the_signature(home: Path, bundles: dict[str, Path]) -> None:
    version = registry.register(bundles["dense"], NAME)
    with pytest.raises(Exception, match="shape"):
        mlflow_client.predict(version.uri, np.zeros((1, 1, 32, 32), np.float32))


def test_a_bundle_is_fetched_whole(home: Path, bundles: dict[str, Path]) -> None:
    version = registry.register(bundles["dense"], NAME)
    fetched = registry.fetch_bundle(version.uri)
    assert bundle.digest(fetched) == version.digest
    assert fetched.is_relative_to(home)
    assert registry.fetch_bundle(version.uri) == fetched


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_refused(home: Path, bundles: dict[str, Path]) -> None:
    version = registry.register(bundles["dense"], NAME)
    fetched = registry.fetch_bundle(version.uri)
    (fetched / "weights.safetensors").write_bytes(b"damaged")
    assert bundle.digest(registry.fetch_bundle(version.uri)) == version.digest
    shutil.rmtree(fetched)
    (original,) = logged(version).rglob("weights.safetensors")
    original.write_bytes(b"damaged")
    with pytest.raises(RegistryError, match="damaged"):
        registry.fetch_bundle(version.uri)


def test_the_working_directory_stays_clean_and_nothing_is_printed(
    home: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code = f"""
from pathlib import Path
from tasks import mlflow_client, registry, tracking
run = tracking.open_run("a", {{"b": 1}})
registry.register_dense(Path({str(bundles["dense"])!r}), {NAME!r})
mlflow_client.predict("models:/{NAME}@champion")
tracking.close_run(run)
"""
    quiet = process(code, empty)
    assert quiet.communicate() == ("", "")
    assert quiet.returncode == 0
    assert list(empty.iterdir()) == []


def test_another_state_folder_is_another_registry(
    home: Path, bundles: dict[str, Path], migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register_dense(bundles["dense"], NAME)
    shutil.copytree(migrated, tmp_path / "other")
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "other"))
    with pytest.raises(RegistryError, match="no model"):
        registry.resolve(f"models:/{NAME}@dense")


@pytest.mark.slow
def test_a_database_of_another_mlflow_is_copied_before_it_is_migrated(home: Path) -> None:
    mark = state.mlflow_db().with_name("mlflow.db.migrated")
    mark.write_text("0.0.1")
    mlflow_store.ready(registry.tracking_uri())
    assert mark.read_text() != "0.0.1"
    assert len(list(home.glob("mlflow.db.before-*"))) == 1


@pytest.mark.slow
def test_a_file_that_is_no_database_is_named(home: Path) -> None:
    state.mlflow_db().write_bytes(b"no database at all" * 100)
    state.mlflow_db().with_name("mlflow.db.migrated").unlink()
    with pytest.raises(RegistryError, match="cannot be migrated"):
        mlflow_store.ready(registry.tracking_uri())


@pytest.mark.slow
def test_processes_that_race_on_a_fresh_registry_all_win(bundles: dict[str, Path]) -> None:
    code = """
from pathlib import Path
from tasks import registry
print(registry.register_dense(Path({folder!r}), {name!r}).version)
"""
    racers = [process(code.format(folder=str(bundles[which]), name=NAME)) for which in ("dense", "healed", "dense")]
    said = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], said
    versions = [out.strip() for out, _ in said]
    assert versions[0] == versions[2]
    assert sorted(set(versions)) == ["1", "2"]
    assert len(registry.complete_versions(NAME)) == 2


@pytest.fixture
def server(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A live server on the loopback, with proxied files."""
    folder = tmp_path / "server"
    shutil.copytree(migrated, folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "files")]
    log = (tmp_path / "server.log").open("w")
    served = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", seconds=120)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        served.terminate()
        served.wait(30)
        log.close()


def wait_for(address: str, seconds: float) -> None:
    """Until somebody answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert time.monotonic() < deadline, f"nothing answers at {address}"
            time.sleep(0.5)


@pytest.mark.slow
def test_a_live_server_serves_as_well(server: str, bundles: dict[str, Path], logits: Logits) -> None:
    from tasks import tracking

    run = tracking.open_run("flow-1", {"a.b": 1})
    tracking.log_curve(run, "loss", [1.0 / step for step in range(1, 1200)])
    tracking.log_dataset(run, "digits", "f" * 64, "calibration")
    version = registry.register(bundles["healed"], NAME, run_id=run)
    registry.register_dense(bundles["dense"], NAME)
    assert registry.aliases(NAME) == {"dense": "2", "champion": "2"}
    inputs = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(mlflow_client.predict(version.uri, inputs), logits("healed", inputs))
    assert bundle.digest(registry.fetch_bundle(version.uri)) == version.digest
    assert registry.register(bundles["healed"], NAME, run_id=run) == version
    with pytest.raises(RegistryError, match="did you mean champion"):
        registry.resolve(f"models:/{NAME}@campion")
    assert not state.mlflow_db().exists()
