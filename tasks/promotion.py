"""Promotion: who serves. The challenger is measured, judged, and takes the champion's place, or does not.

Aliases: `dense` is what was compressed, `champion` serves, `previous` served before it, `challenger` asks;
a rejected version keeps `challenger`, so that people can look at it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from heal import bundle, cost
from heal.bundle_format import WEIGHTS
from heal.errors import HealError
from heal.evaluation import agreement, predict, top1
from heal.images import ImageArray, Replay
from tasks import ledger, mlflow_client, registry
from tasks.gate import Gate, Measured, Verdict, judge
from tasks.ledger import Move
from tasks.registry import CHALLENGER, CHAMPION, DENSE, PREVIOUS, RegistryError

VERDICT, MOVED, REMOVED = "regrow.verdict", "regrow.moved", "regrow.rolled_back"
LATENCY_BATCH = 32
CPU = torch.device("cpu")


class PromotionError(HealError):
    """The champion was not moved, or was moved back."""


class ChampionMovedError(PromotionError):
    """The champion is no longer the version that the gate compared with."""


@dataclass(frozen=True)
class Decision:
    """What became of a challenger, in `reason` in words.

    champion: who served when it was decided. verdict: None if nothing was measured. move: None if
    the champion stayed. rejected: the gate said no, now or when it was asked before.
    """

    name: str
    version: str
    champion: str | None
    verdict: Verdict | None
    move: Move | None
    reason: str
    rejected: bool = False

    @property
    def promoted(self) -> bool:
        """Whether this version took the champion's place."""
        return self.move is not None


def ask(
    name: str,
    version: str,
    gate: Gate,
    images: Tensor | ImageArray,
    labels: Tensor | None = None,
    *,
    evaluation: str = "",
    again: bool = False,
    allow_adapters: Collection[str] = (),
    device: torch.device = CPU,
    batch_size: int = 64,
) -> Decision:
    """Measure a version against the champion, judge it, and promote it if it passes; unless it is `settled`.

    `images` [n, 3, h, w] are the pinned evaluation images, `labels` [n] theirs, or None: then
    agreement with dense is all that quality is judged by. `evaluation` names both.
    """
    decided = settled(name, version, gate, evaluation, again)
    if decided is not None:
        return decided
    champion = registry.aliases(name).get(CHAMPION)
    with registry.lock(name):
        _point(name, CHALLENGER, version, "asks to be promoted")
    measured = measure(name, version, champion, images, labels, gate, allow_adapters, device, batch_size)
    verdict = judge(measured, gate, evaluation)
    if verdict.passed:
        return _promoted(name, version, champion, verdict)
    _remember(name, version, verdict, champion)
    failed = ", ".join(criterion.name for criterion in verdict.criteria if not criterion.passed)
    return Decision(name, version, champion, verdict, None, f"version {version} is rejected: {failed}", rejected=True)


def settled(name: str, version: str, gate: Gate, evaluation: str = "", again: bool = False) -> Decision | None:
    """The outcome where there is nothing to measure, else None.

    A version that was judged by these limits on these images against this champion is not asked again, and neither is
    one that was champion before, or was rolled back: it must not come back with the next schedule, nor
    may two schedules take turns. A person may ask `again`.
    """
    challenger = registry.version_of(f"models:/{name}/{version}")
    champion = registry.aliases(name).get(CHAMPION)
    if champion == version:
        return Decision(name, version, champion, None, None, f"version {version} is the champion already")
    if again:
        return None
    last, rejected = json.loads(challenger.tags.get(VERDICT, "{}")), False
    if REMOVED in challenger.tags:
        why = "was rolled back"
    elif champion is not None and f"{MOVED}.{CHAMPION}" in challenger.tags:
        why = f"was champion before version {champion}"
    elif last and (last["gate"], last.get("evaluation"), last["champion"]) == (gate.digest, evaluation, champion):
        rejected = not last["passed"]
        why = f"was judged by these limits on these images before ({'rejected' if rejected else 'passed'})"
    else:
        return None
    reason = f"version {version} {why}; regrow promote --version {version} asks again"
    return Decision(name, version, champion, None, None, reason, rejected)


def _promoted(name: str, version: str, champion: str | None, verdict: Verdict) -> Decision:
    try:
        move = promote(name, version, verdict, expect=champion)
    except ChampionMovedError:
        with registry.lock(name):
            held = registry.aliases(name)
            if held.get(CHAMPION) != version:
                raise
            # The same run elsewhere was faster.
            if held.get(CHALLENGER) == version:
                _point(name, CHALLENGER, None, "is the champion now")
        return Decision(name, version, version, verdict, None, f"version {version} is the champion already")
    return Decision(name, version, champion, verdict, move, f"version {version} is the champion now")


def measure(
    name: str,
    challenger: str,
    champion: str | None,
    images: Tensor | ImageArray,
    labels: Tensor | None,
    gate: Gate,
    allow_adapters: Collection[str] = (),
    device: torch.device = CPU,
    batch_size: int = 64,
) -> Measured:
    """Load dense, champion and challenger from the registry and run them on the same images [n, 3, h, w].

    Seconds are measured only if the gate limits the speed-up: one batch of at most 32, dense and
    challenger in turns.
    """
    folders = {DENSE: registry.fetch_bundle(f"models:/{name}@{DENSE}")}
    folders[CHALLENGER] = registry.fetch_bundle(f"models:/{name}/{challenger}")
    if champion is not None and labels is not None:
        folders[CHAMPION] = registry.fetch_bundle(f"models:/{name}/{champion}")
    networks = {who: bundle.load(folder, allow_adapters).to(device) for who, folder in folders.items()}
    # At first the champion is the dense model itself: nothing answers twice.
    holders = {folder: who for who, folder in folders.items()}
    answers = {folder: predict(networks[who], images, batch_size) for folder, who in holders.items()}
    logits = {who: answers[folder] for who, folder in folders.items()}
    shares = {} if labels is None else {f"{who}_top1": top1(values, labels) for who, values in logits.items()}
    batch = next(iter(Replay(images, LATENCY_BATCH)))
    return Measured(
        images=len(logits[DENSE]),
        agreement=agreement(logits[CHALLENGER], logits[DENSE]),
        bytes=(folders[CHALLENGER] / WEIGHTS).stat().st_size,
        macs=cost.macs(networks[CHALLENGER], batch.shape[1:]),
        speedup=None if gate.min_speedup is None else _speedup(networks, batch),
        **shares,
    )


def promote(
    name: str,
    version: str,
    verdict: Verdict,
    images_example: NDArray[np.float32] | None = None,
    *,
    expect: str | None,
) -> Move:
    """Make a judged version the champion, if the champion is still `expect`, the one that the gate saw.

    It is loaded as a server would and predicts on `images_example` (None: on the version's own) before it moves, as
    this process may be killed, and as models:/NAME@champion after; if that fails, every alias goes back. Raises
    ChampionMovedError, PromotionError.
    """
    if not verdict.passed:
        raise PromotionError(f"version {version} of {name} did not pass the gate; it is not promoted\n{verdict}")
    with registry.lock(name):
        _check_before(name, version, images_example)
        held = registry.aliases(name)  # at the last moment: another state folder does not share the lock
        if held.get(CHAMPION) != expect:
            raise ChampionMovedError(
                f"the champion of {name} is version {held.get(CHAMPION)} now, the gate compared with {expect}; "
                "nothing was moved; run the gate again"
            )
        with _moved_back_on_failure(name, held, version):
            move = _crown(name, held, version, "passed the gate", verdict.digest)
            _check_serves(f"models:/{name}@{CHAMPION}", images_example)
            _remember(name, version, verdict, expect)
        if held.get(CHALLENGER) == version:
            _point(name, CHALLENGER, None, "is the champion now")
    return move


def rollback(name: str, to: str | None = None) -> Move:
    """Make version `to` (None: the previous champion) the champion, after a check that it serves.

    Raises RegistryError when there is nothing to go back to, PromotionError when it does not serve.
    """
    with registry.lock(name):
        target = _target(name, registry.aliases(name), to)
        _check_before(name, target, None)
        held = registry.aliases(name)
        with _moved_back_on_failure(name, held, target):
            move = _crown(name, held, target, "rolled back")
            _check_serves(f"models:/{name}@{CHAMPION}", None)
        if held.get(CHAMPION) is not None:
            registry.set_tag(name, held[CHAMPION], REMOVED, move.when)
    return move


def _target(name: str, held: dict[str, str], to: str | None) -> str:
    """The version to go back to. Without `to` never one that was itself rolled back."""
    target = to or held.get(PREVIOUS)
    why = "it has no previous champion" if target is None else ""
    if target is not None:
        version = registry.version_of(f"models:/{name}/{target}")
        if target == held.get(CHAMPION):
            why = f"version {target} is the champion already"
        elif to is None and REMOVED in version.tags:
            why = f"the previous champion, version {target}, was rolled back"
    if target is None or why:
        known = ", ".join(version.version for version in registry.complete_versions(name)) or "none"
        raise RegistryError(f"{name} cannot be rolled back: {why}; name a version with --to (there are: {known})")
    return target


def _crown(name: str, held: dict[str, str], version: str, reason: str, gate: str | None = None) -> Move:
    if REMOVED in registry.version_of(f"models:/{name}/{version}").tags:
        registry.set_tag(name, version, REMOVED, None)
    if held.get(CHAMPION) is not None:
        _point(name, PREVIOUS, held.get(CHAMPION), reason)
    return _point(name, CHAMPION, version, reason, gate)


def _point(name: str, alias: str, version: str | None, reason: str, gate: str | None = None) -> Move:
    """Move one alias, and write it down: in the ledger, and on the version."""
    before = registry.aliases(name).get(alias)
    registry.set_alias(name, alias, version)
    move = ledger.record(name, alias, before, version, reason, gate)
    if version is not None:
        registry.set_tag(name, version, f"{MOVED}.{alias}", move.line())
    return move


@contextmanager
def _moved_back_on_failure(name: str, held: dict[str, str], version: str) -> Iterator[None]:
    tags = registry.version_of(f"models:/{name}/{version}").tags
    try:
        yield
    except BaseException as error:  # also when interrupted: who served must serve again
        for tag in (f"{MOVED}.{CHAMPION}", REMOVED):
            if registry.version_of(f"models:/{name}/{version}").tags.get(tag) != tags.get(tag):
                registry.set_tag(name, version, tag, tags.get(tag))
        for alias in (CHAMPION, PREVIOUS):
            if registry.aliases(name).get(alias) != held.get(alias):
                _point(name, alias, held.get(alias), f"version {version} failed: {type(error).__name__}: {error}"[:500])
        if isinstance(error, Exception):
            raise PromotionError(
                f"version {version} of {name} does not serve ({type(error).__name__}: {error}); "
                f"the champion is version {held.get(CHAMPION)} again"
            ) from error
        raise


def _check_before(name: str, version: str, images: NDArray[np.float32] | None) -> None:
    registry.version_of(f"models:/{name}/{version}")
    try:
        _check_serves(f"models:/{name}/{version}", images)
    except Exception as error:
        raise PromotionError(
            f"version {version} of {name} does not serve ({type(error).__name__}: {error}); nothing was moved"
        ) from error


def _check_serves(uri: str, images: NDArray[np.float32] | None) -> None:
    logits = mlflow_client.predict(uri, images)
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise PromotionError(f"it answers {list(logits.shape)}, finite: {bool(np.isfinite(logits).all())}")


def _speedup(networks: dict[str, nn.Module], batch: Tensor) -> float:
    timed = cost.latency({who: networks[who] for who in (DENSE, CHALLENGER)}, batch)
    return timed[DENSE].median / timed[CHALLENGER].median


def _remember(name: str, version: str, verdict: Verdict, champion: str | None) -> None:
    """Tag the version with its latest verdict."""
    content: dict[str, Any] = {"gate": verdict.gate, "evaluation": verdict.evaluation, "champion": champion}
    content |= {
        "passed": verdict.passed,
        "digest": verdict.digest,
        "criteria": [asdict(criterion) for criterion in verdict.criteria],
    }
    registry.set_tag(name, version, VERDICT, json.dumps(content))
