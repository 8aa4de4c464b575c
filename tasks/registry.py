"""The registry of models: versions, aliases, and the bundles behind them.

It brings MLflow, which takes seconds to import: whoever needs this module imports it where it is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from tasks import ledger, liveness, mlflow_client, mlflow_store, state
from tasks.addresses import public
from tasks.mlflow_client import AnswerError, client
from tasks.mlflow_store import RegistryError as RegistryError
from tasks.mlflow_store import tracking_uri as tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

DIGEST, COMPLETE, ARTIFACTS, ADAPTER = "regrow.digest", "regrow.complete", "regrow.artifacts", "regrow.adapter"
DENSE, CHAMPION, CHALLENGER, PREVIOUS = "dense", "champion", "challenger", "previous"

_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class Version:
    """A complete registered version: `uri` names it for good, `digest` is its bundle's."""

    name: str
    version: str
    uri: str
    digest: str
    tags: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


def resolve(uri: str) -> str:
    """The bundle digest behind models:/NAME@ALIAS or models:/NAME/VERSION, now. Raises RegistryError."""
    return version_of(uri).digest


def version_of(uri: str) -> Version:
    """The version behind models:/NAME@ALIAS or models:/NAME/VERSION, now.

    Raises RegistryError, with the names that exist, when there is no such registry, model, alias or
    version, or when the version was never finished.
    """
    parts = _URI.fullmatch(uri)
    if parts is None:
        raise RegistryError(f"{uri!r} names no version; write models:/NAME@ALIAS or models:/NAME/VERSION")
    name = parts["name"]
    held = aliases(name)
    if parts["alias"] and parts["alias"] not in held:
        _missing("alias", parts["alias"], held, f"model {name}")
    number = parts["version"] or held[parts["alias"]]
    try:
        found = client().get_model_version(name, number)
    except AnswerError as error:
        _unless_missing(error)
        _missing("version", number, [str(known.version) for known in _all_versions(name)], f"model {name}")
    if found.tags.get(COMPLETE) != "true" or DIGEST not in found.tags:
        raise RegistryError(f"{uri} (version {number}) is no finished regrow version; register its bundle again")
    return _version(found)


def aliases(name: str) -> dict[str, str]:
    """Alias -> version number of a registered model. Raises RegistryError when there is no such model."""
    mlflow_store.require(tracking_uri())
    try:
        held = client().get_registered_model(name).aliases
    except AnswerError as error:
        _unless_missing(error)
        _missing("model", name, [model.name for model in client().search_registered_models(max_results=1000)], "it")
    # A database gives numbers, a server strings.
    return {alias: str(number) for alias, number in held.items()}


def set_alias(name: str, alias: str, version: str | None) -> None:
    """Point an alias at a version; None takes it away."""
    if version is None:
        client().delete_registered_model_alias(name, alias)
    else:
        client().set_registered_model_alias(name, alias, version)


def set_tag(name: str, version: str, key: str, value: str | None) -> None:
    """Tag a version; a value has at most 8000 characters, None takes the tag away."""
    if value is None:
        client().delete_model_version_tag(name, version, key)
    else:
        client().set_model_version_tag(name, version, key, value)


def fetch_bundle(uri: str) -> Path:
    """A local folder with the bundle behind `uri`, its digest verified. Raises RegistryError."""
    version = version_of(uri)
    folder = state.home() / "bundles" / version.digest
    if not _holds(folder, version.digest):
        shutil.rmtree(folder, ignore_errors=True)
        _download(version, folder)
        if not _holds(folder, version.digest):
            raise RegistryError(
                f"the files of {version.uri} are damaged: they are not {version.digest}; register again"
            )
    return folder


def register(
    bundle: Path,
    name: str,
    *,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    input_example: NDArray[np.float32] | None = None,
    allow_adapters: Collection[str] = (),
    description: str = "",
) -> Version:
    """Register a bundle under a name, once: a complete version of the same bundle gets the new tags instead.

    The version is logged inside the run `run_id` (None: the one of MLFLOW_RUN_ID, else a new one).
    `tags` say where these bytes came from last, `description` what people see of them;
    `input_example` [n, 3, h, w] defaults to noise of the bundle's input size.
    Its last tag is `regrow.complete`: a version without it does not exist for regrow.
    """
    from heal import bundle as bundles  # brings torch; reading the registry needs none
    from tasks import serving

    wanted = {**(tags or {}), DIGEST: bundles.digest(bundle)}
    if (adapter := bundles.adapter(bundle)) is not None:
        wanted[ADAPTER] = adapter
    client()  # makes the registry if there is none
    with lock(name):
        found = next((v for v in complete_versions(name) if v.digest == wanted[DIGEST]), None)
        if found is None:
            example = serving.example(bundle) if input_example is None else input_example
            with _run(run_id, name) as run:
                model_id = mlflow_client.log_model(bundle, run, example, allow_adapters)
                return _new_version(name, model_id, run, wanted, description)
        for tag in wanted.items() - found.tags.items():
            set_tag(name, found.version, *tag)
        return version_of(found.uri)


def register_dense(bundle: Path, name: str, allow_adapters: Collection[str] = ()) -> Version:
    """Register what to compress: the version takes the alias `dense`, and `champion` if nobody has it.

    Raises RegistryError when another model is `dense` already: schedules compress what it names.
    """
    from heal import bundle as bundles  # brings torch

    refuse_other_dense(name, bundles.digest(bundle))
    marks = {"regrow.role": "dense"}
    version = register(bundle, name, tags=marks, allow_adapters=allow_adapters, description="The dense model.")
    with lock(name):
        refuse_other_dense(name, version.digest)
        held = aliases(name)
        for alias in (DENSE, CHAMPION) if CHAMPION not in held else (DENSE,):
            if held.get(alias) != version.version:
                set_alias(name, alias, version.version)
                ledger.record(name, alias, held.get(alias), version.version, "dense model registered")
    return version


def refuse_other_dense(name: str, digest: str) -> None:
    """Raise RegistryError when the alias `dense` of a model points to another bundle than this."""
    if not mlflow_store.exists(tracking_uri()):
        return
    registered = {model.name for model in client().search_registered_models(max_results=1000)}
    if name not in registered or DENSE not in aliases(name):
        return
    held = version_of(f"models:/{name}@{DENSE}")
    if held.digest != digest:
        raise RegistryError(
            f"{name}@{DENSE} is version {held.version}, another model than dense.source; "
            f"choose another registration.name, or move the alias {DENSE} by hand first"
        )


def complete_versions(name: str) -> list[Version]:
    """Every finished version of a model, oldest first; empty when there is no such model."""
    found = [_version(v) for v in _all_versions(name) if v.tags.get(COMPLETE) == "true" and DIGEST in v.tags]
    return sorted(found, key=lambda version: int(version.version))


def referenced_artifacts() -> set[str]:
    """The store's artifacts that a finished version of any model was made from."""
    if not mlflow_store.exists(tracking_uri()):
        return set()
    models = client().search_registered_models(max_results=1000)
    tags = (version.tags.get(ARTIFACTS, "{}") for model in models for version in complete_versions(model.name))
    return {digest for text in tags for digest in json.loads(text).values()}


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold what is written about a model; it keeps out writers that use this state folder."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RegistryError(f"{name!r} is no name for a model; use letters, digits, dots, dashes and underscores")
    with mlflow_store.locked(state.home() / "locks" / f"{name}.lock"):
        yield


@contextmanager
def _run(run_id: str | None, name: str) -> Iterator[str]:
    """The run to write into: the given one, this process's, or a new one, which then ends here."""
    run = run_id or os.environ.get("MLFLOW_RUN_ID")
    if run:
        yield run
        return
    marks = liveness.identity()
    made = client().create_run(mlflow_client.experiment(), tags=marks, run_name=f"register {name}").info.run_id
    ending = "FAILED"
    try:
        yield str(made)
        ending = "FINISHED"
    finally:
        client().set_terminated(made, ending)


def _new_version(name: str, model_id: str, run: str, tags: Mapping[str, str], description: str) -> Version:
    try:
        client().create_registered_model(name)
    except AnswerError as error:
        if error.code != "RESOURCE_ALREADY_EXISTS":
            raise RegistryError(f"the model {name!r} cannot be made: {error}") from error
    made = client().create_model_version(
        name, f"models:/{model_id}", run, tags=dict(tags), model_id=model_id, description=description or None
    )
    set_tag(name, str(made.version), COMPLETE, "true")
    return version_of(f"models:/{name}/{made.version}")


def _download(version: Version, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as beside:
        (bundle,) = mlflow_client.download(f"{version.uri}/artifacts", Path(beside)).iterdir()
        try:
            os.replace(bundle, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise


def _holds(folder: Path, digest: str) -> bool:
    from heal import bundle as bundles
    from heal.errors import BundleError

    try:
        return folder.exists() and bundles.digest(folder) == digest
    except BundleError:
        return False


def _all_versions(name: str) -> list[ModelVersion]:
    mlflow_store.require(tracking_uri())
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client().search_model_versions(f"name='{name}'", max_results=1000, page_token=token)
        found.extend(page)
        if not (token := page.token):
            return found


def _version(found: ModelVersion) -> Version:
    number, digest = str(found.version), found.tags[DIGEST]
    if not re.fullmatch("[0-9a-f]{64}", digest):  # it names a folder here, and anybody can write tags
        raise RegistryError(
            f"version {number} of {found.name} has a tag {DIGEST} that is no digest; delete the version"
        )
    return Version(found.name, number, f"models:/{found.name}/{number}", digest, dict(found.tags))


def _unless_missing(error: AnswerError) -> None:
    if error.code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        raise error


def _missing(kind: str, wanted: str, known: Collection[str], owner: str) -> NoReturn:
    near = get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "register one first" if not known else "name one of these"
    listed = ", ".join(sorted(known)) or "none"
    raise RegistryError(
        f"the registry {public(tracking_uri())} has no {kind} {wanted!r} ({owner} has: {listed}); {hint}"
    )
