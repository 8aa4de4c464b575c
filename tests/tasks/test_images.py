"""Images: pixels as timm's own transforms give them, an array on disk, nothing decoded that is no image."""

from __future__ import annotations

import io
import math
import os
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from heal import bundle
from heal.errors import ImagesError
from heal.images import ImageArray as ImageArrayProtocol
from heal.images import Replay, is_array
from tasks import artifacts
from tasks.classes import Classes
from tasks.images import array, load_evaluation, load_source
from tasks.params import load
from tasks.preprocessing import Preprocessing, decode, parse
from tasks.progress import Progress
from tests.heal import nets
from tests.tasks.pictures import folder, picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Preprocessing((8, 8), MEAN, STD)


class Heard:
    """A display that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    def say(self, message: str) -> None:
        self.lines.append(message)

    def show(self, description: str, done: int, total: int) -> None:
        pass

    def close(self) -> None:
        pass


def timm_pixels(encoded: bytes, size: int, crop_pct: float, crop_mode: str, interpolation: str) -> torch.Tensor:
    from heal.compat import timm

    transform = timm.data.create_transform(
        input_size=(3, size, size),
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        is_training=False,
    )
    made: torch.Tensor = transform(Image.open(io.BytesIO(encoded)).convert("RGB"))
    return made


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_pct", "crop"), [(0.875, "center"), (0.9, "center"), (1.0, "center"), (0.9, "squash")])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (97, 61), (61, 97), (256, 300), (20, 33)])
def test_pixels_equal_timms(
    width: int, height: int, crop_pct: float, crop: str, interpolation: str, tmp_path: Path
) -> None:
    encoded = picture(0, width, height)
    preprocessing = Preprocessing((56, 56), MEAN, STD, math.floor(56 / crop_pct), crop, interpolation)
    ours = array([("a", encoded)], 1, preprocessing, tmp_path / "a.npy")[torch.tensor([0])][0]
    torch.testing.assert_close(ours, timm_pixels(encoded, 56, crop_pct, crop, interpolation))


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    preprocessing = Preprocessing((32, 32), MEAN, STD, resize=40)
    noise = np.asarray(Image.open(io.BytesIO(picture(0, 40, 60))))
    np.testing.assert_array_equal(preprocessing.pixels(picture(0, 40, 60)), noise[14:46, 4:36])


@given(width=st.integers(1, 90), height=st.integers(1, 90), rows=st.integers(1, 40), columns=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_image_gives_the_size_without_borders(width: int, height: int, rows: int, columns: int) -> None:
    encoded = io.BytesIO()
    Image.new("RGB", (width, height), (255, 255, 255)).save(encoded, "PNG")
    for crop in ("center", "squash"):
        pixels = Preprocessing((rows, columns), MEAN, STD, crop=crop).pixels(encoded.getvalue())
        assert pixels.shape == (rows, columns, 3)
        assert pixels.min() == 255


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_every_mode_becomes_rgb(mode: str, form: str) -> None:
    assert decode(picture(0, form=form, mode=mode)).mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    encoded = io.BytesIO()
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(encoded, "PNG")
    assert np.asarray(decode(encoded.getvalue()))[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_half_an_image_is_no_image(form: str) -> None:
    whole = picture(0, 64, 64, form=form)
    decode(whole)
    for encoded in (whole[: len(whole) // 2], whole[:10], b"", b"no image"):
        with pytest.raises(ImagesError, match="cannot be decoded"):
            decode(encoded)


@given(st.binary(max_size=64), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_damaged_bytes_decode_or_are_refused(noise: bytes, at: int) -> None:
    whole = picture(0, 24, 24)
    with suppress(ImagesError):
        assert decode(whole[:at] + noise + whole[at + len(noise) :]).mode == "RGB"


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (None, "lacks size, mean, std; set dense.preprocessing.size"),
        ({"size": [8, 8], "mean": [0, 0, 0]}, "lacks std"),
        ({"size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "pad": 3}, "'pad'"),
        ({"size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "crop": "border"}, "crop 'border'"),
        ({"size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "random"}, "interpolation 'random'"),
        ({"size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "resize": 4}, "resize 4"),
        ({"size": [8, 8], "mean": [0, 0, 0], "std": [1, 0, 1]}, "must be positive"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(described: dict[str, object] | None, expected: str) -> None:
    with pytest.raises(ImagesError, match=expected):
        parse(described)


def test_preprocessing_survives_json() -> None:
    assert parse(SMALL.described()) == SMALL


def test_the_array_is_what_methods_take(tmp_path: Path) -> None:
    made = array(((str(n), picture(n)) for n in range(5)), 5, SMALL, tmp_path / "images.npy")
    assert isinstance(made, ImageArrayProtocol)
    assert is_array(made)
    assert (made.shape, len(made)) == ((5, 3, 8, 8), 5)
    batch = made[torch.tensor([4, 0, 4])]
    assert (batch.dtype, batch.shape, batch.is_contiguous()) == (torch.float32, (3, 3, 8, 8), True)
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(torch.cat(list(Replay(made, 2)))[4], batch[0])
    assert not os.listdir(tmp_path)


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    rows = [("good.png", picture(0)), ("bad.png", picture(1)[:50])]
    with pytest.raises(ImagesError, match=r"image bad\.png cannot be decoded"):
        array(rows, 2, SMALL, tmp_path / "images.npy")
    with pytest.raises(ImagesError, match="no images"):
        array([], 0, SMALL, tmp_path / "images.npy")


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    encoded = picture(0, 64, 64)
    preprocessing = Preprocessing((64, 64), MEAN, STD)

    def peak(count: int) -> int:
        tracemalloc.start()
        array((("a", encoded) for _ in range(count)), count, preprocessing, tmp_path / "images.npy")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)
    assert peak(1024) < 1.5 * peak(128)


def evaluation(tmp_path: Path, shared: bool, *overrides: str):  # type: ignore[no-untyped-def]
    """Of a network with ten classes."""
    artifacts.write_json(tmp_path / "calibration.json", {"shared": shared})
    artifacts.write_json(tmp_path / "dense.json", {"classes": 10})
    if not (tmp_path / "bundle").exists():
        bundle.save(nets.build("vit"), tmp_path / "bundle", metadata={"preprocessing": SMALL.described()})
    heard = Heard()
    section = load(None, overrides).evaluation
    return load_evaluation(section, tmp_path, tmp_path, Progress(tmp_path / "work", heard)), heard.lines


def test_evaluation_reads_labels_only_when_allowed(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", ["3/a.png", "5/b.png"])
    source = f"evaluation.source=imagefolder:{root}"
    images, said = evaluation(tmp_path, False, source)
    assert images.labels.tolist() == [3, 5]
    assert "labels are read" in said[0]
    images, said = evaluation(tmp_path, False, source, "evaluation.labels=false")
    assert images.labels is None
    assert "labels are not read" in said[0]


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        (Classes(3, ("dog", "owl", "cat")), [2, 0]),
        (Classes(2), [0, 1]),
        (Classes(2, ("dog", "owl")), "no class 'cat'"),
        (Classes(3), "names 2 classes, the network has 3"),
        (Classes(3, ("dog", "cat", "dog")), "the network has 2 classes called 'dog'"),
        (Classes(4, ("dog", "owl", "cat", "owl")), [2, 0]),
    ],
)
def test_named_classes_count_by_their_place_among_the_networks(classes: Classes, found: list[int] | str) -> None:
    labels = {"cat/1.png": "cat", "dog/2.png": "dog"}
    if isinstance(found, list):
        said: list[str] = []
        assert list(classes.indices(labels, "here", said.append).values()) == found
        assert len(said) == (classes.names is None), "what was guessed is said"
    else:
        with pytest.raises(ImagesError, match=found):
            classes.indices(labels, "here")


def test_a_label_beyond_the_networks_classes_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", ["3/a.png", "10/b.png"])
    with pytest.raises(ImagesError, match=r"the label of 10/b\.png is 10, but the network has 10 classes, 0 to 9"):
        evaluation(tmp_path, False, f"evaluation.source=imagefolder:{root}")
    with pytest.raises(ImagesError, match="the label of b is -1"):  # what the hub calls unknown
        Classes(10).indices({"a": 0, "b": -1}, "here")


def test_evaluation_takes_labels_and_subsets_from_a_table(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text("file,label,kind\nb.png,1,hard\na.png,0,easy\n")
    overrides = [f"evaluation.source=imagefolder:{root}", f"evaluation.labels={tmp_path / 'labels.csv'}"]
    images, _ = evaluation(tmp_path, False, *overrides, "evaluation.subsets=kind")
    assert (images.labels.tolist(), images.subsets, images.ids) == ([0, 1], ["easy", "hard"], ["a.png", "b.png"])


def test_evaluation_without_labels_to_read_says_what_to_do(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", ["a.png"])
    with pytest.raises(ImagesError, match=r"evaluation\.labels is true, but imagefolder:images has no labels"):
        evaluation(tmp_path, False, f"evaluation.source=imagefolder:{root}")


def test_evaluation_keeps_to_its_side_of_a_shared_source(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", [f"{n % 2}/{n}.png" for n in range(40)])
    whole, _ = evaluation(tmp_path, False, f"evaluation.source=imagefolder:{root}")
    held_out, _ = evaluation(tmp_path, True, f"evaluation.source=imagefolder:{root}")
    assert len(whole.ids) == 40
    assert 0 < len(held_out.ids) < 25


def test_a_whole_source_loads_with_its_labels(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", ["0/a.png", "1/b.png"])
    images, labels, ids = load_source(f"imagefolder:{root}", SMALL, Classes(2), tmp_path)
    assert (images.shape, labels.tolist(), ids) == ((2, 3, 8, 8), [0, 1], ["0/a.png", "1/b.png"])
