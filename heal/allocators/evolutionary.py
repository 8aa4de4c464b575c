"""UniPTS' reducing-regrowing search: every layer loses more than is asked, and evolution deals out the surplus.

Source: "UniPTS: A Unified Framework for Proficient Post-Training Sparsity" (CVPR 2024), github.com/xjjxmu/UniPTS.
A genome x [layers] stands for shares q = softmax(x) of a surplus E = extra * N. With P the sparsity asked for, N
all weights and n_l those of a layer (or, of a budget in MACs, their MACs):

    sparsity_l = max(0, P + extra - E q_l / n_l)

so the constant genome adds equally many weights to every layer, which is not the same sparsity. The first
population is the constant genome and uniform ones in (0, 1). Every next one is children of the best of the one
before: half by uniform crossover, the first of them again the constant genome, and half by mutation, which
multiplies a tenth of the genes by 1 + N(0, 1). No parent survives; the best of the last population is the answer.

Deviations. The source's fitness is top-1 by labels; here that is a choice (`fitness: labels`), not the default, and
log and evidence say when labels were read. The source draws the images that judge with replacement and augments
them; here they are the first of the calibration set as they are. Where P + extra > 1 the surplus is all that may
stay, so that no layer starts below nothing (`clamp: official`: it does). The source's input noise of 1e-6 is left
out: it cannot regularise anything.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.allocators.trial import Fitness, Judge, Norms, Trial, at_most, labels_of, refuse_trial
from heal.errors import MethodError
from heal.images import generator
from heal.method import AllocationContext
from heal.naming import refuse_unknown
from heal.values import Allocation, Budget

GENE_RATE = 0.1
"""The share of genes that a mutation changes (the source)."""

LEAST = 1e-280
"""Of a share q: one that underflows to 0 could not grow when others are full. It is worth no weight at all."""


@dataclass(frozen=True)
class Evolutionary:
    """The allocation whose masked network is the fittest of those that evolution tries.

    include: parts beside the table's layers that are pruned too (the source prunes all of them).
    population, generations, parents: 2 <= parents < population, generations >= 1; 25, 25 and 10 (the source).
        A search judges population + generations * (population - 1) candidates: 625.
    extra: the surplus as a share of the pool, in (0, 1); 0.05 (the source).
    clamp: what a layer cannot take as it is full already: "redistribute" deals it to the others in proportion to
        their shares; "official" loses it as the source does. Then less is kept than the budget asks for, against
        the law of exact budgets, and log and evidence say so.
    images: how many of the calibration images judge, >= 1; 10240 (the source). batch_size: >= 1; 64.
    fitness: "agreement" with the dense network, or "kl" (see `trial`); "labels" (the source), top-1 by the labels
        of the context, ties broken by minus the divergence from the dense network.
    bn: how BatchNorm statistics are estimated: "cumulative", or "ema_reset" (the source).
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()
    population: int = 25
    generations: int = 25
    parents: int = 10
    extra: float = 0.05
    clamp: Literal["redistribute", "official"] = "redistribute"
    images: int = 10240
    batch_size: int = 64
    fitness: Literal["agreement", "kl", "labels"] = "agreement"
    bn: Norms = "cumulative"

    def __post_init__(self) -> None:
        refuse_parts("evolutionary", self.include)
        refuse_trial("evolutionary", self.images, self.fitness, self.bn, ("agreement", "kl", "labels"))
        refuse_unknown("evolutionary.clamp", self.clamp, ("redistribute", "official"))
        if not 2 <= self.parents < self.population:
            raise MethodError(
                f"evolutionary.parents = {self.parents} must be at least 2 and below population = {self.population}"
            )
        for name in ("generations", "batch_size"):
            if getattr(self, name) < 1:
                raise MethodError(f"evolutionary.{name} = {getattr(self, name)} must be at least 1")
        if not 0 < self.extra < 1:
            raise MethodError(f"evolutionary.extra = {self.extra:g} is not a share in (0, 1); the source has 0.05")

    @property
    def needs(self) -> frozenset[str]:
        """Images, to judge the candidates, and their labels where the fitness is by them."""
        return frozenset({"images", "labels"} if self.fitness == "labels" else {"images"})

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer; the evidence has the winner's genome and the best of every generation.

        Saves after every generation and goes on from there. Raises ImagesError, NumericalError.
        """
        pool = Pool.of(model, self.include, budget, context)
        images, judge = at_most(context, self.images, "evolutionary"), self._judge(context)
        checkpoint = _Checkpoint(self, pool, context)
        past = checkpoint.restore()
        trial = Trial(model, pool.weights, images, self.batch_size, judge, self.bn)
        while len(past) <= self.generations:
            past.append(self._generation(past, pool, trial, context))
            checkpoint.save(past)
        return self._answer(past, pool, context)

    def allocation(self, pool: Pool, genome: Tensor) -> Allocation:
        """What a genome [layers], float64, stands for."""
        shares = dict(zip(pool.weights, genome.softmax(0).clamp_min(LEAST).tolist(), strict=True))
        surplus = self.extra if self.clamp == "official" else min(self.extra, pool.share)
        dealt = surplus * sum(pool.sizes.values())
        # A layer that is never called has no MACs; any density does for it.
        gains = {layer: dealt * share / max(pool.sizes[layer], 1) for layer, share in shares.items()}
        base = pool.share - surplus
        if self.clamp == "redistribute":
            return pool.allocation(pool.filled(gains, base=base))
        removed = {layer: min(max(1 - base - gain, 0.0), 1.0) for layer, gain in gains.items()}
        counts = {layer: total - math.floor(removed[layer] * total + 1e-9) for layer, total in pool.totals.items()}
        return pool.counted(counts)

    def _judge(self, context: AllocationContext) -> Judge | Tensor:
        """What judges, as a trial takes it."""
        if self.fitness != "labels":
            return self.fitness
        labels = labels_of(context, self.images, "evolutionary")
        context.log(f"labels of {len(labels)} calibration images are read (evolutionary.fitness)")
        return labels

    def _next(self, past: list[Generation], pool: Pool, seed: int) -> Tensor:
        """The genomes of the next population [candidates, layers]."""
        draw = generator(seed, f"evolution, generation {len(past)}")
        constant = torch.full((1, len(pool.weights)), 1 - pool.share, dtype=torch.float64)
        if not past:
            drawn = torch.rand(self.population - 1, len(pool.weights), dtype=torch.float64, generator=draw)
            return torch.cat([constant, drawn])
        best = past[-1].genomes[past[-1].ranking[: self.parents]]
        crossed = self.population // 2
        mutated = mutations(best, self.population - 1 - crossed, draw)
        return torch.cat([constant, crossovers(best, crossed - 1, draw), mutated])

    def _generation(self, past: list[Generation], pool: Pool, trial: Trial, context: AllocationContext) -> Generation:
        genomes = self._next(past, pool, context.seed)
        before = sum(len(generation.genomes) for generation in past)
        total = self.population + self.generations * (self.population - 1)
        found: list[Fitness] = []
        for genome in genomes:
            found.append(trial.fitness(self.allocation(pool, genome).kept))
            context.report("evolution", before + len(found), total)
        best, mean = max(found)[0], sum(first for first, _ in found) / len(found)
        context.log(f"generation {len(past)} of {self.generations}: {self.fitness} best {best:.4f}, mean {mean:.4f}")
        return Generation(genomes, torch.tensor(found, dtype=torch.float64))

    def _answer(self, past: list[Generation], pool: Pool, context: AllocationContext) -> Allocation:
        last = past[-1]
        winner = last.genomes[last.ranking[0]]
        evidence = {
            "genome": winner.tolist(),
            "fitness": last.fitness[last.ranking[0]].tolist(),
            "constant": last.fitness[0].tolist(),
            "evaluations": sum(len(generation.genomes) for generation in past),
            "generations": [generation.summary for generation in past],
        }
        if self.fitness == "labels":
            evidence["labels"] = True
        found = self.allocation(pool, winner)
        if self.clamp == "official":
            evidence["lost"] = found.asked - found.got
            context.log(
                f"clamp official does not meet the budget: {found.got} kept where {found.asked} were asked for, "
                f"{1 - found.got / found.whole:.5f} removed instead of {1 - pool.share:.5f}"
            )
        return pool.counted(found.kept, evidence)


class Generation(NamedTuple):
    """genomes [candidates, layers] and their fitness [candidates, 2], float64."""

    genomes: Tensor
    fitness: Tensor

    @property
    def ranking(self) -> list[int]:
        """The numbers of the candidates, the best first; of equal ones the earlier."""
        return sorted(range(len(self.genomes)), key=lambda number: tuple(self.fitness[number].tolist()), reverse=True)

    @property
    def summary(self) -> dict[str, Any]:
        """Fitness of the best, mean of the first number over all, genome of the best."""
        best = self.ranking[0]
        return {
            "best": self.fitness[best].tolist(),
            "mean": float(self.fitness[:, 0].mean()),
            "genome": self.genomes[best].tolist(),
        }


def crossovers(parents: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Children [count, layers] of two different parents each, every gene from either with equal chance."""
    children = parents.new_empty(count, parents.shape[1])
    for child in children:
        one, other = torch.randperm(len(parents), generator=draw)[:2]
        child.copy_(torch.where(torch.rand(len(child), generator=draw) < 0.5, parents[one], parents[other]))
    return children


def mutations(parents: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Children [count, layers] of one parent each: x (1 + N(0, 1)) where a gene mutates, at GENE_RATE."""
    chosen = parents[torch.randint(len(parents), (count,), generator=draw)]
    mutates = torch.rand(chosen.shape, generator=draw) < GENE_RATE
    factor = 1 + torch.randn(chosen.shape, dtype=torch.float64, generator=draw)
    return torch.where(mutates, chosen * factor, chosen)


class _Checkpoint:
    """One safetensors file, replaced atomically: genomes and fitness of all generations so far."""

    def __init__(self, method: Evolutionary, pool: Pool, context: AllocationContext) -> None:
        self.context = context
        self.path = None if context.checkpoints is None else context.checkpoints / "evolutionary.safetensors"
        device = next(iter(pool.weights.values())).device.type
        about = {"seed": context.seed, "asked": pool.asked, "sizes": pool.sizes, "device": device}
        self.search = json.dumps(asdict(method) | about, sort_keys=True)

    def restore(self) -> list[Generation]:
        """The generations of the last checkpoint, if it is of this search."""
        if self.path is None or not self.path.exists():
            return []
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("search") != self.search:
                self.context.log(f"checkpoint {self.path.name} is of another search: starting anew")
                return []
            count = len(list(file.keys())) // 2
            past = [Generation(file.get_tensor(f"genomes/{k}"), file.get_tensor(f"fitness/{k}")) for k in range(count)]
        self.context.log(f"resuming after generation {count - 1}")
        return past

    def save(self, past: list[Generation]) -> None:
        if self.path is None:
            return
        tensors = {f"genomes/{k}": generation.genomes for k, generation in enumerate(past)}
        tensors |= {f"fitness/{k}": generation.fitness for k, generation in enumerate(past)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        save_file(tensors, beside, metadata={"search": self.search})
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, self.path)
        self.context.checkpoint_saved()
