"""Internal states: the outputs of a network's blocks, and how well two networks agree on them."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, ImagesError, NumericalError
from heal.families.lookup import describe
from heal.images import Images, Replay, is_array
from heal.modes import evaluating, listening
from heal.pruned import goals, kept
from heal.values import ChannelCut, Mask

EPS = 1e-12
Layout = Literal["tokens", "maps"]


@contextmanager
def block_outputs(model: nn.Module, blocks: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after each forward pass, every block's output (with its gradient).

    Of a block that gives several values the first tensor counts. Raises ArchitectureError in the
    forward pass when a block gives none.
    """
    outputs: dict[str, Tensor] = {}
    with listening(model, {f"{block}.output": _keeper(outputs, block) for block in blocks}):
        yield outputs


def chosen(state: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
    """A block's output with the channels `keep` [k] alone; with all of them for None."""
    axis = -1 if layout == "tokens" else 1
    return state if keep is None else state.index_select(axis, keep.to(state.device))


def rows(state: Tensor, layout: Layout) -> Tensor:
    """A block's output as float32 rows [r, d] whose directions are compared.

    "tokens": one row a token, channels last. "maps": one row an image, [c * h * w], as STARFISH does.
    """
    return (state.flatten(0, -2) if layout == "tokens" else state.flatten(1)).float()


def cosine(student: Tensor, teacher_unit: Tensor) -> Tensor:
    """Mean cosine (scalar) between rows [r, d] and unit rows [r, d], float32."""
    return ((student * teacher_unit).sum(-1) / _length(student)).mean()


def alignment(
    student: nn.Module,
    teacher: nn.Module,
    images: Images,
    pruned: Mask | ChannelCut | None = None,
    limit: int = 128,
) -> dict[str, float]:
    """Mean cosine per block between student and teacher over the first `limit` images; 1 is perfect.

    pruned: what was cut: of a state that lost channels those that stay are compared, of a block that was dropped
    nothing (`goals`). Raises ArchitectureError where the table does not say which.
    """
    layout, asked = describe(teacher).states, goals(teacher, pruned)
    keep = kept(teacher, pruned, "blocks") if pruned else {}
    sums, weight = dict.fromkeys(asked, 0.0), 0
    device = next(teacher.parameters()).device
    with (
        evaluating(student),
        evaluating(teacher),
        torch.inference_mode(),
        block_outputs(student, asked) as ours,
        block_outputs(teacher, asked.values()) as theirs,
    ):
        for batch in Replay(images, 32):
            student(batch.to(device)), teacher(batch.to(device))
            for block, goal in asked.items():
                wanted = chosen(theirs[goal], layout, keep.get(block))
                _refuse_unlike(block, ours[block], wanted)
                found, unit = rows(ours[block], layout), _unit(rows(wanted, layout))
                sums[block] += len(batch) * float(cosine(found, unit))
            weight += len(batch)
            if weight >= limit:
                break
    return {block: total / weight for block, total in sums.items()}


@dataclass(frozen=True)
class Answer:
    """The teacher's of a batch: unit rows [r, d] of every state, float32, the rows' lengths [r], and the logits."""

    units: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]
    logits: Tensor


class TeacherStates:
    """The teacher's states and logits, computed once a batch; of states float16 unit rows.

    `pruned`: what was cut of the student; states then have the channels that stay, and are those of `goals`.
    `beyond`: modules behind the blocks whose outputs are states, too.
    Cosines need directions only, so unit rows are kept: float16 then cannot overflow. They stay in
    memory up to `cache_bytes`, on disk (a memory-mapped file) up to `spill_bytes`, and are computed
    again beyond; the values are the same in all three cases.
    """

    def __init__(
        self,
        teacher: nn.Module,
        replay: Replay,
        cache_bytes: int,
        spill_bytes: int,
        log: Callable[[str], None],
        pruned: Mask | ChannelCut | None = None,
        beyond: tuple[str, ...] = (),
    ) -> None:
        self.teacher, self.layout, self.replay = teacher, describe(teacher).states, replay
        self.goals = goals(teacher, pruned) | {module: module for module in beyond}
        self.kept = kept(teacher, pruned, "followers") | kept(teacher, pruned, "blocks") if pruned else {}
        self.cache_bytes, self.spill_bytes, self.log = cache_bytes, spill_bytes, log
        self.buffer: Tensor | None = None
        self.places: dict[tuple[int, str], tuple[int, torch.Size]] = {}
        self.beside: dict[int, tuple[dict[str, Tensor], Tensor]] = {}
        self.seen: dict[int, float] = {}
        self.used = 0
        self.where = ""

    def of(self, index: int, batch: Tensor) -> Answer:
        """The answer to batch number `index`, on the batch's device.

        Raises ImagesError when the batch is not the one that had this number before.
        """
        self._refuse_another(index, batch)
        if index not in self.beside:
            return self._computed(index, batch)
        assert self.buffer is not None
        units = {}
        for block in self.goals:
            start, shape = self.places[index, block]
            units[block] = self.buffer[start : start + shape.numel()].view(shape).to(batch.device).float()
        lengths, logits = self.beside[index]
        return Answer(units, {block: of.to(batch.device) for block, of in lengths.items()}, logits.to(batch.device))

    def _refuse_another(self, index: int, batch: Tensor) -> None:
        """A loader that shuffles or augments would be compared with the states of other images."""
        fingerprint = float(batch.double().sum())
        if self.seen.setdefault(index, fingerprint) != fingerprint:
            raise ImagesError(
                f"images: batch {index} is not the one of the first epoch; healing replays batches in one order: "
                "pass shuffle=False and no augmentation, or one tensor"
            )

    def close(self) -> None:
        """Let go of memory and of the spill file."""
        self.buffer = None
        self.beside.clear()

    def _computed(self, index: int, batch: Tensor) -> Answer:
        with torch.no_grad(), block_outputs(self.teacher, self.goals.values()) as outputs:
            logits = self.teacher(batch)
        layout = self.layout
        stay = {block: chosen(outputs[goal], layout, self.kept.get(block)) for block, goal in self.goals.items()}
        found = {block: rows(state, layout) for block, state in stay.items()}
        lengths = {block: _length(state) for block, state in found.items()}
        halves = {block: (state / lengths[block].unsqueeze(-1)).half() for block, state in found.items()}
        for block, half in halves.items():
            if not bool(torch.isfinite(half).all()):
                raise NumericalError(f"teacher: the output of {block} is not finite; the weights or images hold NaN")
        if not self.where:
            self._choose(sum(half.numel() for half in halves.values()) / len(batch))
        if self.buffer is not None:
            self._store(index, halves)
            self.beside[index] = ({block: length.cpu() for block, length in lengths.items()}, logits.cpu())
        return Answer({block: half.float() for block, half in halves.items()}, lengths, logits)

    def _choose(self, numbers_per_image: float) -> None:
        numbers = math.ceil(numbers_per_image * _count(self.replay))
        if 2 * numbers <= self.cache_bytes:
            self.buffer, self.where = torch.empty(numbers, dtype=torch.float16), "in memory"
        elif 2 * numbers <= min(self.spill_bytes, 0.8 * shutil.disk_usage(tempfile.gettempdir()).free):
            with tempfile.NamedTemporaryFile(prefix="regrow-teacher-") as file:
                # Nameless when this returns: a killed process leaves nothing behind.
                self.buffer = torch.from_file(file.name, shared=True, size=numbers, dtype=torch.float16)
            self.where = "in a memory-mapped file"
        else:
            self.where = "nowhere: computed again each step"
        self.log(f"teacher states: {2 * numbers / 2**20:.0f} MiB, kept {self.where}")

    def _store(self, index: int, halves: dict[str, Tensor]) -> None:
        assert self.buffer is not None
        for block, half in halves.items():
            self.buffer[self.used : self.used + half.numel()] = half.flatten().cpu()
            self.places[index, block] = (self.used, half.shape)
            self.used += half.numel()


def _refuse_unlike(block: str, ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ArchitectureError(
            f"block {block} gives {list(ours.shape)} in the student and {list(theirs.shape)} in the teacher, so states "
            "cannot be compared; name it in `blocks` of the channel group that was cut (regrow_family)"
        )


def _unit(x: Tensor) -> Tensor:
    return x / _length(x).unsqueeze(-1)


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return length.clamp_min(EPS)


def _keeper(outputs: dict[str, Tensor], block: str) -> Callable[[object], None]:
    def keep(output: object) -> None:
        values = output if isinstance(output, (tuple, list)) else (output,)
        first = next((value for value in values if isinstance(value, Tensor)), None)
        if first is None:
            raise ArchitectureError(
                f"block {block} gives a {type(output).__name__}, not a tensor, so its state cannot be compared; give "
                "the network a table (regrow_family) whose blocks give tensors"
            )
        outputs[block] = first

    return keep


def _count(replay: Replay) -> int:
    if is_array(replay.images):
        return int(replay.images.shape[0])
    return sum(len(batch) for batch in replay)
