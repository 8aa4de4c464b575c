"""What a person gets wrong: one message that can be acted on, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from flows import cli, entry
from heal import bundle
from tests.flows.workplace import Workplace
from tests.heal import nets


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workplace]:
    """A workplace that is the working directory; what the command line sets in the environment goes again."""
    before = dict(os.environ)
    made = Workplace.make(tmp_path / "work")
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("REGROW_HOME", str(made.home))
    yield made
    os.environ.clear()
    os.environ.update(before)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def regrow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`regrow WORDS` in this process: exit code and stderr."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["regrow", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return code, capsys.readouterr().err

    return call


def _written(home: Path) -> list[Path]:
    """Artifacts and keys; locks, logs and an empty registry do not count as results."""
    return [path for folder in ("store/artifacts", "store/keys", "prefect") for path in (home / folder).glob("*")]


def _edit(workplace: Workplace, old: str, new: str) -> None:
    file = workplace.folder / "params.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def _pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.jpg")


def _misspelled_key(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "count: 32", "cuont: 32")
    return ("params.yaml:3", "cuont", "count")


def _fifty(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "neurons: 0.5", "neurons: 50")
    return ("params.yaml:4", "50", "0.5")


def _unknown_timm_model(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "bundle:dense", "timm:deit_tiny_patch16_242")
    return ("deit_tiny_patch16_242", "deit_tiny_patch16_224")


def _missing_folder(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "calibration: {source: digits", 'calibration: {source: "imagefolder:nowhere"')
    return ("nowhere",)


def _empty_folder(workplace: Workplace) -> tuple[str, ...]:
    (workplace.folder / "empty").mkdir()
    _edit(workplace, "calibration: {source: digits", 'calibration: {source: "imagefolder:empty"')
    return ("empty holds no image",)


def _corrupt_image(workplace: Workplace) -> tuple[str, ...]:
    _pictures(workplace.folder / "pictures", 40)
    (workplace.folder / "pictures" / "17.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    _edit(workplace, "source: digits, count: 32", 'source: "imagefolder:pictures", count: 40')
    return ("17.jpg", "skip")


def _too_few_images(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "count: 32", "count: 32000")
    return ("32000",)


def _weights_that_do_not_fit(workplace: Workplace) -> tuple[str, ...]:
    state = nn.Linear(3, 3).state_dict()
    safetensors.torch.save_file(state, workplace.folder / "weights.safetensors")
    _edit(workplace, 'source: "bundle:dense"', 'source: "file:weights.safetensors", architecture: vit_tiny_patch16_224')
    return ("weights.safetensors",)


def _nan_weights(workplace: Workplace) -> tuple[str, ...]:
    model = nets.NETS["resnet"]()
    state = model.state_dict()
    state["conv1.weight"][0, 0, 0, 0] = torch.nan
    safetensors.torch.save_file(state, workplace.folder / "weights.safetensors")
    kwargs = "{layers: [1, 2, 1, 1], channels: [8, 16, 24, 16], num_classes: 10}"
    extra = f"architecture: resnet18, architecture_args: {kwargs}"
    _edit(workplace, 'source: "bundle:dense"', f'source: "file:weights.safetensors", {extra}')
    return ("conv1.weight", "NaN")


def _tampered_bundle(workplace: Workplace) -> tuple[str, ...]:
    weights = workplace.folder / "dense" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return ("weights.safetensors", "bundle.json")


def _missing_alias(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "bundle:dense", "models:/tiny@denes")
    return ("no registry", "REGROW_HOME")


def _no_such_channels(workplace: Workplace) -> tuple[str, ...]:
    bundle.save(nets.build("resnet"), workplace.folder / "dense", metadata={"preprocessing": _preprocessing()})
    _edit(workplace, "{multiple: 8}", "{kinds: [qk]}")
    return ("ResNet", "no channels of kind qk", "it has inner, residual")


def _budget_that_cannot_be_met(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "neurons: 0.5", "neurons: 0.99")
    return ("0.99", "cannot be met")


def _methods_that_do_not_go_together(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "pruning: {method: variance}", "pruning: {method: magnitude}")
    return ("magnitude", "weights", "neurons")


def _no_such_device(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "healing:\n", "healing:\n  device: cuda:7\n")
    return ("device cuda:7", "cpu or auto")


def _no_such_device_of_the_allocation(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "budget: {neurons: 0.5}", "device: cuda:7, budget: {neurons: 0.5}")
    return ("device cuda:7", "cpu or auto")


def _subsets_of_no_file(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "evaluation: {", "evaluation: {subsets: origin, ")
    return ("evaluation.subsets", "evaluation.labels names")


def _an_input_that_the_network_does_not_take(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, '"bundle:dense"', '"bundle:dense", preprocessing: {size: [64, 64]}')
    return ("does not take an image of 3 x 64 x 64", "check dense.preprocessing.size")


def _a_picture_that_is_elsewhere(workplace: Workplace) -> tuple[str, ...]:
    _pictures(workplace.folder / "pictures", 40)
    (workplace.folder / "pictures" / "linked.jpg").symlink_to("annex/linked.jpg")
    _edit(workplace, "source: digits, count: 32", 'source: "imagefolder:pictures", count: 40')
    return ("linked.jpg is a link to a file that is not there",)


def _state_that_cannot_be_written(workplace: Workplace) -> tuple[str, ...]:
    workplace.home.touch()
    return (".regrow cannot be written to", "REGROW_HOME")


def _preprocessing() -> dict[str, object]:
    from tests.flows.workplace import PREPROCESSING

    return dict(PREPROCESSING)


def _no_such_device_for_a_model_to_train(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, '"bundle:dense", if_missing: refuse', '"models:/tiny@dense", if_missing: train')
    return _no_such_device(workplace)


def _no_limit_on_quality(workplace: Workplace) -> tuple[str, ...]:
    _edit(
        workplace,
        "promotion: {max_drop_dense: 1.0, max_drop_champion: 1.0, min_agreement: 0.0}",
        "promotion: {max_drop_dense: null, max_drop_champion: null, min_agreement: null}",
    )
    return ("no limit on quality", "set promotion.max_drop_dense")


def _a_repair_of_norms_that_are_not_there(workplace: Workplace) -> tuple[str, ...]:
    _edit(workplace, "methods: [closed_form, starfish]", "methods: [closed_form, batchnorm_recalibration]")
    return ("params.yaml:", "healing.methods: healer batchnorm_recalibration works on BatchNorms", "has none")


def _search(workplace: Workplace, calibration: str) -> None:
    _edit(
        workplace,
        "{method: global_variance, budget: {neurons: 0.5}, global_variance: {multiple: 8}}",
        "{method: evolutionary, budget: {weights: 0.5}, evolutionary: {fitness: labels}}",
    )
    _edit(workplace, "pruning: {method: variance}", "pruning: {method: magnitude}")
    _edit(workplace, "methods: [closed_form, starfish]", "methods: [starfish]")
    _edit(workplace, "calibration: {source: digits, count: 32}", f"calibration: {calibration}")


def _labels_that_must_not_be_read(workplace: Workplace) -> tuple[str, ...]:
    _search(workplace, "{source: digits, count: 32}")
    return ("params.yaml:4: allocation.evolutionary.fitness = labels", "calibration.labels is false", "set it to true")


def _labels_that_are_not_there(workplace: Workplace) -> tuple[str, ...]:
    _pictures(workplace.folder / "pictures", 40)
    _search(workplace, '{source: "imagefolder:pictures", count: 32, labels: true}')
    return ("calibration.labels is true, but imagefolder:pictures has no labels", "choose a calibration.source")


MISTAKES = [
    _misspelled_key,
    _fifty,
    _unknown_timm_model,
    _missing_folder,
    _empty_folder,
    _corrupt_image,
    _too_few_images,
    _weights_that_do_not_fit,
    _nan_weights,
    _tampered_bundle,
    _missing_alias,
    _no_such_channels,
    _budget_that_cannot_be_met,
    _methods_that_do_not_go_together,
    _a_repair_of_norms_that_are_not_there,
    _labels_that_must_not_be_read,
    _labels_that_are_not_there,
    _no_limit_on_quality,
    _no_such_device,
    _no_such_device_of_the_allocation,
    _subsets_of_no_file,
    _an_input_that_the_network_does_not_take,
    _a_picture_that_is_elsewhere,
    _no_such_device_for_a_model_to_train,
    _state_that_cannot_be_written,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__.strip("_"))
def test_a_mistake_gets_one_message_and_writes_nothing(
    mistake: Callable[[Workplace], tuple[str, ...]], workplace: Workplace, regrow: Command
) -> None:
    words = mistake(workplace)
    began = time.monotonic()
    code, errors = regrow("run")
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) <= 5
    assert "Traceback" not in errors
    assert all(word in errors for word in words), errors
    assert _written(workplace.home) == []
    assert time.monotonic() - began < 60  # seconds on an idle machine; a stalled server would take minutes


def test_a_misspelled_override_names_its_neighbour(workplace: Workplace, regrow: Command) -> None:
    code, errors = regrow("run", "-S", "healing.starfihs.lr=3e-4")
    assert code == 2
    assert "starfihs" in errors
    assert "starfish" in errors


def test_a_corrupt_image_is_skipped_when_params_say_so(workplace: Workplace) -> None:
    from tasks import params, rehearsal, resolve
    from tasks.plan import plan
    from tasks.store import Store

    _corrupt_image(workplace)
    _edit(workplace, "count: 40", "count: 32, corrupt: skip, max_skipped: 0.1")
    read = params.load(Path("params.yaml"))
    planned = {stage.name: stage for stage in plan(read, Store(), resolve.resolve(read))}
    rehearsal.rehearse(read, planned, Store())


def test_a_folder_without_params_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regrow: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    code, errors = regrow("run")
    assert code == 2
    assert "params.yaml" in errors
    assert "regrow demo" in errors


def test_a_command_typed_wrongly_ends_with_two(regrow: Command) -> None:
    code, errors = regrow("rnu")
    assert code == 2
    assert "rnu" in errors


def test_a_report_into_a_folder_is_refused(workplace: Workplace, regrow: Command) -> None:
    code, errors = regrow("report", "-o", str(workplace.folder))
    assert code == 2 and "is a folder; name the file" in errors


def test_models_of_two_sizes_are_not_timed_together(workplace: Workplace, regrow: Command) -> None:
    small = _preprocessing() | {"size": [16, 16]}
    bundle.save(nets.build("resnet"), workplace.folder / "small", metadata={"preprocessing": small})
    code, errors = regrow("latency", "bundle:dense", "bundle:small", "-b", "1")
    assert code == 2 and "bundle:small takes images of [16, 16]" in errors


def test_a_taken_port_is_refused(workplace: Workplace) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finished = workplace.run("ui", "--port", str(other.getsockname()[1]))
    assert finished.code == 2
    assert "is taken" in finished.errors and "--port" in finished.errors


def test_without_its_extras_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "flows.cli")
    monkeypatch.delattr("flows.cli")
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    assert "no module typer" in (said := capsys.readouterr().err) and "regrow[pipeline]" in said
