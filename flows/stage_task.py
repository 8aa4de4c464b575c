"""A stage as a Prefect task: order, state and retries are Prefect's, what is cached is the store's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from tasks.runner import Ref

Run = Callable[[str, dict[str, str]], Ref]
"""Stage, and the digests of the artifacts that it reads by their stage -> its own reference."""


def run_as_task(name: str, run: Run, upstream: dict[str, str]) -> Ref:
    """The stage's reference; one that was found ends in a state named Cached. Raises what `run` raises."""
    decorate = task(
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=5,
        retry_condition_fn=_is_transient,
    )

    def ended(stage: str, upstream: dict[str, str]) -> State[Ref]:
        ref = run(stage, upstream)
        return Completed(name="Cached" if ref.cached else "Completed", data=ref)

    as_task: Any = decorate(ended)
    state: State[Ref] = as_task(name, upstream, return_state=True)
    ref: Ref = state.result()
    return ref


def _is_transient(_: Any, __: TaskRun, state: State[Any]) -> bool:
    """Only a lost connection is worth another try; the same input fails the same way."""
    return isinstance(state.result(raise_on_failure=False), (ConnectionError, TimeoutError))
