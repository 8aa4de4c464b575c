"""The allocators that search, against published figures (methods.md 3d, 4a) and slow references."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from heal.allocators.evolutionary import GENE_RATE, Evolutionary, crossovers, mutations
from heal.allocators.sequence import Sequence, candidates, steepest
from heal.compat import timm
from heal.errors import ImagesError, MethodError
from heal.method import AllocationContext
from heal.values import Allocation, Budget
from tests.heal import nets
from tests.heal.judged import ALL, pool_of, the_long_way

SMALL = {"population": 6, "generations": 3, "parents": 3, "images": 8, "batch_size": 4}


def _resnet18(classes: int, stem: int) -> nn.Module:
    model: nn.Module = timm.create_model("resnet18", num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, stem, bias=False)
    return model.eval()


def _context(count: int, size: int = nets.SIZE, checkpoints: Path | None = None, **kwargs: object) -> AllocationContext:
    return AllocationContext(images=nets.images(count, size), checkpoints=checkpoints, **kwargs)  # type: ignore[arg-type]


# --- ATP's sequence


@pytest.mark.parametrize(
    ("slope", "shift", "first", "last"),
    [(0.002, -0.0113871, 0.081387, 0.041387), (0.004, -0.0227742, 0.112774, 0.032774)],
)
def test_sequence_on_cifar_resnet18(slope: float, shift: float, first: float, last: float) -> None:
    model = _resnet18(100, 3)
    found = Sequence(include=ALL, slope=slope).allocate(model, Budget(weights=0.95), AllocationContext())
    assert (found.whole, found.asked, found.got) == (11_210_432, 560_522, 560_522)
    assert found.evidence["shift"] == pytest.approx(shift, abs=1e-7)
    assert found.evidence["slope"] == slope
    densities = [found.kept[layer] / found.total[layer] for layer in found.kept]
    assert densities[0] == pytest.approx(first, abs=1 / 1728)
    assert densities[-1] == pytest.approx(last, abs=1 / 51200)
    steps = -np.diff(densities)
    sizes = np.array(list(found.total.values()))
    np.testing.assert_allclose(steps, slope, atol=1 / sizes.min())
    pool = pool_of(model, Budget(weights=0.95))
    assert steepest(pool) == pytest.approx(0.005)
    assert candidates(0.002, steepest(pool)) == pytest.approx([0.002, 0.004])
    assert candidates(0.01, steepest(pool)) == [steepest(pool)]
    assert candidates(0.001, 0.005) == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005])


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0.01, 0.99), part=st.floats(0.01, 1), unit=st.sampled_from(["weights", "macs"]))
def test_a_sequence_meets_any_budget_and_is_one_shift_of_all_layers(sparsity: float, part: float, unit: str) -> None:
    model, budget = nets.build("resnet"), Budget(**{unit: sparsity})
    pool = pool_of(model, budget)
    method = Sequence(include=ALL, slope=part * steepest(pool))
    found = method.allocate(model, budget, AllocationContext(images=nets.images(1)))
    assert 0 <= found.asked - found.got < max(pool.cost.values())
    assert method.slope is not None
    layers = len(pool.weights)
    for number, layer in enumerate(pool.weights):
        asked = sparsity + method.slope * (number - (layers - 1) / 2) + found.evidence["shift"]
        density, total = min(max(1 - asked, 0), 1), found.total[layer]
        slack = 1 + max(pool.cost.values()) / pool.cost[layer]  # what the rounding of the dearest weight leaves over
        assert abs(found.kept[layer] - density * total) <= slack


@pytest.mark.parametrize("fitness", ["agreement", "kl"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_slope_is_the_best_of_the_candidates(name: str, fitness: str) -> None:
    dense, images = nets.build(name), nets.images(24)
    method = Sequence(include=ALL, step=0.01, images=16, fitness=fitness)  # type: ignore[arg-type]
    budget, said = Budget(weights=0.7), list[str]()
    found = method.allocate(dense, budget, AllocationContext(images=images, log=said.append))
    slopes = [0.01 * number for number in range(1, 1 + int(0.6 / (len(found.kept) - 1) / 0.01 + 1e-9))]
    assert [candidate["slope"] for candidate in found.evidence["candidates"]] == pytest.approx(slopes)
    judged = []
    for candidate in found.evidence["candidates"]:
        fixed = Sequence(include=ALL, slope=candidate["slope"]).allocate(dense, budget, AllocationContext())
        slow = the_long_way(dense, fixed, images[:16], "cumulative", 64)
        slow = slow if fitness == "agreement" else slow[::-1]
        assert candidate["fitness"] == pytest.approx(list(slow), rel=1e-4)
        judged.append((tuple(candidate["fitness"]), fixed))
    assert found.kept == max(judged, key=lambda pair: pair[0])[1].kept
    assert len(said) == 1 and f"slope {found.evidence['slope']:g}" in said[0]
    json.dumps(found.evidence, allow_nan=False)


def test_a_sequence_needs_images_only_to_pick_its_slope() -> None:
    model = nets.build("vit")
    assert Sequence().needs == {"images"} and not Sequence(slope=0.01).needs
    with pytest.raises(ImagesError, match="sequence tries its candidates on calibration images"):
        Sequence().allocate(model, Budget(weights=0.5), AllocationContext())
    with pytest.raises(MethodError, match=r"sequence.slope = 0.2 is above 0.0909.*12 layers at sparsity 0.5"):
        Sequence(slope=0.2).allocate(model, Budget(weights=0.5), AllocationContext())
    with pytest.raises(MethodError, match="greater than 0"):
        Sequence(step=0.0)
    with pytest.raises(MethodError, match="did you mean 'agreement'"):
        Sequence(fitness="agrement")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"sequence.images = 0"):
        Sequence(images=0)


def test_a_single_layer_has_nothing_to_slope() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten())
    found = Sequence().allocate(model, Budget(weights=0.5), _context(2, size=2))
    assert list(found.kept.values()) == [24] and found.evidence["slope"] == 0


# --- UniPTS' search


def _official(sizes: np.ndarray, sparsity: float, genome: np.ndarray) -> np.ndarray:
    """The source's formula."""
    share = np.exp(genome) / np.exp(genome).sum()
    return np.maximum(0, sparsity + 0.05 - 0.05 * sizes.sum() * share / sizes)


@pytest.mark.parametrize(
    ("classes", "stem", "sparsity", "removed"),
    [
        (1000, 7, 0.9, 0.90333),
        (1000, 7, 0.8, 0.80348),
        (1000, 7, 0.5, 0.50735),
        (1000, 7, 0.95, 0.95325),
        (100, 3, 0.9, 0.90392),
    ],
)
def test_the_official_clamp_loses_what_the_source_loses(
    classes: int, stem: int, sparsity: float, removed: float
) -> None:
    """methods.md 4a's figures are those of ImageNet's ResNet-18; CIFAR's, with 100 classes, loses a little more."""
    pool = pool_of(_resnet18(classes, stem), Budget(weights=sparsity))
    assert len(pool.weights) == 21
    constant = torch.full((21,), sparsity, dtype=torch.float64)
    found = Evolutionary(include=ALL, clamp="official").allocation(pool, constant)
    assert 1 - found.got / found.whole == pytest.approx(removed, abs=5e-6)
    assert found.got < found.asked
    sizes = np.array(list(pool.sizes.values()), dtype=float)
    expected = sizes - np.floor(_official(sizes, sparsity, constant.numpy()) * sizes + 1e-9)
    assert list(found.kept.values()) == expected.astype(int).tolist()
    exact = Evolutionary(include=ALL).allocation(pool, constant)
    assert exact.got == exact.asked


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), sparsity=st.floats(0.05, 0.99), spread=st.floats(0, 8))
@example(seed=189, sparsity=0.0625, spread=6.0)
def test_what_a_full_layer_cannot_take_goes_to_the_others_by_their_shares(
    seed: int, sparsity: float, spread: float
) -> None:
    pool = pool_of(nets.build("resnet"), Budget(weights=sparsity))
    genome = spread * torch.randn(len(pool.weights), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = Evolutionary(include=ALL).allocation(pool, genome)
    assert found.got == found.asked
    sizes = np.array(list(pool.sizes.values()), dtype=float)
    surplus = min(0.05, 1 - sparsity)
    share, full = np.exp(genome.numpy()), np.zeros(len(sizes), dtype=bool)
    while True:  # deal the surplus to those that are not full, until nobody more is
        left = surplus * sizes.sum() - ((sparsity + surplus) * sizes)[full].sum()
        kept = (1 - sparsity - surplus) * sizes + left * share / share[~full].sum()
        kept[full] = sizes[full]
        if not (kept > sizes * (1 + 1e-12)).any():
            break
        full |= kept > sizes
    np.testing.assert_allclose(list(found.kept.values()), kept, atol=1 + 1e-6)
    if not full.any() and sparsity < 0.95:
        official = Evolutionary(include=ALL, clamp="official").allocation(pool, genome)
        assert 0 <= official.got - found.got <= len(sizes), "without a full layer only the rounding differs"


def test_a_budget_in_macs_deals_macs() -> None:
    model, budget = nets.build("resnet"), Budget(macs=0.9)
    pool = pool_of(model, budget)
    found = Evolutionary(include=ALL).allocation(pool, torch.zeros(len(pool.weights), dtype=torch.float64))
    assert found.cost and 0 <= found.asked - found.got < max(found.cost.values())
    added = [found.kept[layer] * found.cost[layer] - 0.05 * size for layer, size in pool.sizes.items()]
    open_layers = [a for a, layer in zip(added, pool.sizes, strict=True) if found.kept[layer] < found.total[layer]]
    assert np.ptp(open_layers) <= 2 * max(found.cost.values()), "the constant genome adds equally many MACs everywhere"


@pytest.mark.parametrize("clamp", ["redistribute", "official"])
def test_a_search_takes_the_budgets_at_the_ends(clamp: str) -> None:
    model = nets.build("vit")
    method = Evolutionary(include=ALL, clamp=clamp)  # type: ignore[arg-type]
    whole = pool_of(model, Budget(weights=0.0))
    genome = torch.linspace(-900, 900, len(whole.weights), dtype=torch.float64)
    found = method.allocation(whole, genome)
    assert clamp == "official" or found.kept == whole.totals, "a share that underflows still fills up"
    least = pool_of(model, Budget(weights=0.999))
    found = method.allocation(least, torch.zeros_like(genome))
    assert (clamp == "official" and found.got > found.asked) or found.got == found.asked


def test_crossovers_mix_two_parents_and_mutations_change_a_tenth_of_one() -> None:
    parents = torch.arange(5.0, dtype=torch.float64)[:, None].expand(5, 2000) + 1
    children = crossovers(parents, 200, torch.Generator().manual_seed(0))
    for child in children:
        values, counts = child.unique(return_counts=True)
        assert len(values) == 2 and counts.min() > 850
    pairs = {tuple(child.unique().tolist()) for child in children}
    assert len(pairs) == 10, "every pair of parents has children"
    children = mutations(parents, 200, torch.Generator().manual_seed(0))
    kept = (children[:, :, None] == parents[:, 0]).any(2)
    assert 1 - kept.double().mean() == pytest.approx(GENE_RATE, abs=0.005)
    origin = children.median(1).values
    assert set(origin.tolist()) == {1.0, 2.0, 3.0, 4.0, 5.0}
    factors = (children / origin[:, None])[~kept]
    assert float(factors.mean()) == pytest.approx(1, abs=0.02) and float(factors.std()) == pytest.approx(1, abs=0.02)


def test_the_search_goes_as_the_source_goes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    dense, images, lines, done = nets.build("resnet"), nets.images(8), list[str](), list[tuple[int, int]]()
    context = AllocationContext(
        images=images,
        seed=3,
        checkpoints=tmp_path,
        log=lines.append,
        report=lambda what, k, n: done.append((k, n)) if what == "evolution" else None,
    )
    method, budget = Evolutionary(include=ALL, **SMALL), Budget(weights=0.6)  # type: ignore[arg-type]
    found = method.allocate(dense, budget, context)
    saved = load_file(tmp_path / "evolutionary.safetensors")
    genomes = [saved[f"genomes/{k}"] for k in range(4)]
    fitness = [saved[f"fitness/{k}"] for k in range(4)]
    assert [len(generation) for generation in genomes] == [6, 5, 5, 5]
    assert done == [(k, 21) for k in range(1, 22)] and found.evidence["evaluations"] == 21
    assert len(lines) == 4 and "generation 3 of 3: agreement best" in lines[-1]
    assert all((generation[0] == 0.6).all() for generation in genomes), "the constant genome is in every population"
    assert (genomes[0][1:] >= 0).all() and (genomes[0][1:] < 1).all()
    pool = pool_of(dense, budget)
    for number, (generation, judged) in enumerate(zip(genomes, fitness, strict=True)):
        for genome, values in zip(generation, judged, strict=True):
            slow = the_long_way(dense, method.allocation(pool, genome), images, "cumulative", 4)
            assert values.tolist() == pytest.approx(list(slow), rel=1e-4)
        ranked = sorted(zip(judged.tolist(), generation.tolist(), strict=True), key=lambda pair: pair[0], reverse=True)
        stated = found.evidence["generations"][number]
        assert (stated["best"], stated["genome"]) == ranked[0]
        assert stated["mean"] == pytest.approx(float(judged[:, 0].mean()))
        if number < 3:
            parents = torch.tensor([genome for _, genome in ranked[:3]], dtype=torch.float64)
            inherited = (genomes[number + 1][1:, None] == parents).any(1)
            assert inherited[:2].all(), "a crossover's genes are its parents'"
            assert inherited[2:].double().mean() > 0.7, "most of a mutation's genes are its parent's"
    best = max(zip(fitness[-1].tolist(), genomes[-1].tolist(), strict=True), key=lambda pair: pair[0])
    assert (found.evidence["fitness"], found.evidence["genome"]) == best
    assert found.evidence["fitness"] >= found.evidence["constant"] == fitness[0][0].tolist()
    assert found.kept == method.allocation(pool, torch.tensor(best[1], dtype=torch.float64)).kept
    json.dumps(found.evidence, allow_nan=False)


def test_the_official_clamp_says_that_it_misses_the_budget() -> None:
    said: list[str] = []
    context = _context(8, log=said.append)
    method = Evolutionary(include=ALL, clamp="official", bn="ema_reset", **SMALL)  # type: ignore[arg-type]
    found = method.allocate(nets.build("resnet"), Budget(weights=0.6), context)
    assert found.evidence["lost"] == found.asked - found.got > 0
    assert f"{found.got} kept where {found.asked} were asked for" in said[-1]


def test_same_seed_same_search_and_another_seed_another() -> None:
    model, method, budget = nets.build("vit"), Evolutionary(**SMALL), Budget(weights=0.6)  # type: ignore[arg-type]
    first, again, other = (method.allocate(model, budget, _context(8, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first.evidence["generations"] != other.evidence["generations"]


def _tiny() -> tuple[nn.Module, torch.Tensor]:
    """A network and its images; timm, which takes seconds to import, has no part in it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return model.eval(), torch.randn(8, 3, 16, 16)


KILLED = f"""
import sys, time
from pathlib import Path
import torch
from torch import nn
from heal.allocators.evolutionary import Evolutionary
from heal.method import AllocationContext
from heal.values import Budget

{inspect.getsource(_tiny)}

def report(what, done, total):
    if what == "evolution" and done == 6 + 5 + 3:
        print("in the middle of generation 2", flush=True)
        time.sleep(600)


torch.set_num_threads(int(sys.argv[2]))
model, images = _tiny()
context = AllocationContext(images=images, checkpoints=Path(sys.argv[1]), report=report)
Evolutionary(include={ALL}, **{SMALL}).allocate(model, Budget(weights=0.6), context)
"""


def test_a_search_that_is_killed_goes_on_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(torch.get_num_threads())]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle of generation 2\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    model, images = _tiny()
    said, done, saved = list[str](), list[int](), list[bool]()

    def search(checkpoints: Path | None, seed: int = 0) -> Allocation:
        context = AllocationContext(
            images=images,
            seed=seed,
            checkpoints=checkpoints,
            checkpoint_saved=lambda: saved.append(True),
            report=lambda what, k, n: done.append(k),
            log=said.append,
        )
        return Evolutionary(include=ALL, **SMALL).allocate(model, Budget(weights=0.6), context)  # type: ignore[arg-type]

    resumed = search(tmp_path)
    assert said[0] == "resuming after generation 1" and done == list(range(12, 22)) and len(saved) == 2
    assert resumed == search(None)
    assert search(tmp_path) == resumed and said[-1] == "resuming after generation 3", "it has only to answer"
    assert search(tmp_path, seed=1) == search(None, seed=1) != resumed
    assert any("of another search: starting anew" in line for line in said)


def test_params_that_make_no_search_are_refused() -> None:
    for params, message in (
        ({"parents": 1}, "parents = 1 must be at least 2"),
        ({"parents": 25}, "below population = 25"),
        ({"generations": 0}, "generations = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"images": 0}, "images = 0"),
        ({"extra": 0.0}, "extra = 0 is not a share"),
        ({"clamp": "oficial"}, "did you mean 'official'"),
        ({"fitness": "label"}, "did you mean 'labels'"),
        ({"bn": "exact"}, "bn = 'exact' is unknown"),
        ({"include": ("stem", "stem")}, "twice"),
    ):
        with pytest.raises(MethodError, match=message):
            Evolutionary(**params)  # type: ignore[arg-type]
    with pytest.raises(ImagesError, match="evolutionary tries its candidates"):
        Evolutionary().allocate(nets.build("vit"), Budget(weights=0.5), AllocationContext())
