"""The calibration stage: images drawn by (seed, count), whatever their labels, disjoint from evaluation, known to
decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from heal import bundle
from heal.errors import ImagesError
from tasks import artifacts, calibration, data
from tasks.images import load_calibration, load_evaluation
from tasks.params import load
from tasks.preprocessing import Preprocessing
from tasks.progress import Display, Progress
from tasks.table import STAGES
from tests.heal import nets
from tests.tasks.pictures import folder, picture, table
from tests.tasks.test_images import Heard

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LABELS = "calibration.labels=true"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    bundle.save(nets.build("vit"), root / "bundle", metadata={"preprocessing": PREPROCESSING.described()})
    artifacts.write_json(root / "dense.json", {"classes": nets.CLASSES})
    return root


def drawn(
    dense: Path, output: Path, *overrides: str, display: Display | None = None
) -> tuple[list[str], dict[str, Any]]:
    """Run the stage; the ids in order, and calibration.json."""
    output.mkdir(parents=True, exist_ok=True)
    params = load(None, [f"dense.source=bundle:{dense / 'bundle'}", *overrides]).restrict(STAGES["calibration"].params)
    calibration.run(params, {"dense": dense}, output, Progress(output / "work", display))
    return pq.read_table(output / "images.parquet")["id"].to_pylist(), artifacts.read_json(output / "calibration.json")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return folder(tmp_path / "pictures", [f"{n % 3}/{n:02d}.png" for n in range(40)])


def apart(pictures: Path, tmp_path: Path, count: int = 8) -> list[str]:
    """Overrides: calibrate on the pictures, evaluate on others."""
    other = folder(tmp_path / "other", ["x.png"])
    (other / "x.png").write_bytes(picture(1000))
    sources = [f"calibration.source=imagefolder:{pictures}", f"evaluation.source=imagefolder:{other}"]
    return [*sources, f"calibration.count={count}"]


def test_the_artifact_holds_what_was_drawn(dense: Path, pictures: Path, tmp_path: Path) -> None:
    ids, described = drawn(dense, tmp_path / "out", *apart(pictures, tmp_path))
    rows = pq.read_table(tmp_path / "out" / "images.parquet").to_pylist()
    assert len(set(ids)) == 8
    assert all(row["image"] == (pictures / row["id"]).read_bytes() for row in rows)
    assert described == {
        "source": "imagefolder:pictures",
        "count": 8,
        "ids_digest": data.digest(data.open_source(f"imagefolder:{pictures}"), ids),
        "preprocessing": PREPROCESSING.described(),
        "shared": False,
        "skipped": [],
        "duplicates": [],
    }


def test_the_array_holds_the_images_in_the_order_of_the_drawing(dense: Path, pictures: Path, tmp_path: Path) -> None:
    ids, _ = drawn(dense, tmp_path / "out", *apart(pictures, tmp_path))
    images = load_calibration(tmp_path / "out", tmp_path / "work")
    last = PREPROCESSING.pixels((pictures / ids[-1]).read_bytes())
    expected = torch.from_numpy(last.copy()).permute(2, 0, 1).float() / 255 * 2 - 1
    torch.testing.assert_close(images[torch.tensor([7])][0], expected)


def test_same_seed_same_bytes_and_other_seeds_draw_others(dense: Path, pictures: Path, tmp_path: Path) -> None:
    overrides = apart(pictures, tmp_path)
    first, _ = drawn(dense, tmp_path / "1", *overrides)
    drawn(dense, tmp_path / "2", *overrides)
    for name in ("images.parquet", "calibration.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert drawn(dense, tmp_path / "3", *overrides, "calibration.seed=1")[0] != first


def test_a_larger_count_draws_the_smaller_one_first(dense: Path, pictures: Path, tmp_path: Path) -> None:
    few, _ = drawn(dense, tmp_path / "1", *apart(pictures, tmp_path, 4))
    many, _ = drawn(dense, tmp_path / "2", *apart(pictures, tmp_path, 12))
    assert many[:4] == few


def test_each_row_group_is_read_once(
    dense: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups of a published data set hold a gigabyte; drawing at random must not read them again and again."""
    groups: list[int] = []
    read = pq.ParquetFile.read_row_group

    def noted(file: pq.ParquetFile, group: int, columns: list[str]) -> Any:
        groups.append(group)
        return read(file, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    source = table(tmp_path / "many.parquet", 40)
    ids, _ = drawn(dense, tmp_path / "out", *apart(pictures, tmp_path), f"calibration.source=parquet:{source}")
    assert ids != sorted(ids) and len(groups) == len(set(groups))


def test_no_label_is_read(dense: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.sources.imagefolder import ImageFolder

    def refuse(self: ImageFolder) -> None:
        raise AssertionError("labels were read")

    monkeypatch.setattr(ImageFolder, "labels", refuse)
    heard = Heard()
    drawn(dense, tmp_path / "out", *apart(pictures, tmp_path), display=heard)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images.parquet", "calibration.json"}
    assert heard.lines == ["draws 8 of 40 images of imagefolder:pictures; labels are not read"]
    with pytest.raises(AssertionError, match="labels were read"):
        drawn(dense, tmp_path / "labelled", *apart(pictures, tmp_path), LABELS)


def test_labels_that_are_allowed_are_kept_and_draw_no_other_image(dense: Path, pictures: Path, tmp_path: Path) -> None:
    overrides, heard = apart(pictures, tmp_path), Heard()
    ids, without = drawn(dense, tmp_path / "without", *overrides)
    again, described = drawn(dense, tmp_path / "out", *overrides, LABELS, display=heard)
    assert artifacts.load_labels(tmp_path / "out").tolist() == [int(image.partition("/")[0]) for image in ids]
    assert again == ids and described == without | {"labels": True}
    files = [tmp_path / name / "images.parquet" for name in ("without", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert heard.lines == ["draws 8 of 40 images of imagefolder:pictures; labels are read (calibration.labels)"]


def test_labels_are_kept_as_the_networks_classes(dense: Path, tmp_path: Path) -> None:
    """By their place among the network's names, as in an evaluation of the same images."""
    named = tmp_path / "named"
    names = ["owl", "cat", "dog", *"abcdefg"]
    bundle.save(
        nets.build("vit"), named / "bundle", metadata={"preprocessing": PREPROCESSING.described(), "class_names": names}
    )
    artifacts.write_json(named / "dense.json", {"classes": nets.CLASSES})
    pictures = folder(tmp_path / "pictures", [f"{kind}/{n}.png" for kind in ("cat", "dog", "owl") for n in range(4)])
    ids, _ = drawn(named, tmp_path / "out", *apart(pictures, tmp_path, 12), LABELS)
    artifacts.write_json(tmp_path / "calibration.json", {"shared": False})
    section = load(None, [f"evaluation.source=imagefolder:{pictures}"]).evaluation
    evaluated = load_evaluation(section, named, tmp_path, Progress(tmp_path / "work"))
    assert evaluated.labels is not None
    by_id = dict(zip(evaluated.ids, evaluated.labels.tolist(), strict=True))
    assert artifacts.load_labels(tmp_path / "out").tolist() == [by_id[image] for image in ids]
    assert by_id["owl/0.png"] == 0
    with pytest.raises(ImagesError, match="names 3 classes, the network has 10"):
        drawn(dense, tmp_path / "unnamed", *apart(pictures, tmp_path), LABELS)


@pytest.mark.parametrize(("label", "message"), [(-1, "the label of x3 is -1"), (10, "10, but the network has 10 cl")])
def test_an_image_of_unknown_class_is_refused_by_name(label: int, message: str, dense: Path, tmp_path: Path) -> None:
    columns = {"id": [f"x{n}" for n in range(8)], "label": [*range(3), label, *range(4)]}
    source = f"calibration.source=parquet:{table(tmp_path / 'a.parquet', 8, columns)}"
    overrides = [*apart(folder(tmp_path / "unused", ["x.png"]), tmp_path), source]
    with pytest.raises(ImagesError, match=message):
        drawn(dense, tmp_path / "out", *overrides, LABELS)
    drawn(dense, tmp_path / "without", *overrides)


def test_a_source_without_labels_is_refused_when_they_are_wanted(dense: Path, tmp_path: Path) -> None:
    flat = folder(tmp_path / "flat", [f"{n}.png" for n in range(8)])
    with pytest.raises(ImagesError, match=r"calibration\.labels is true, but imagefolder:flat has no labels; choose"):
        drawn(dense, tmp_path / "out", *apart(flat, tmp_path), LABELS)
    assert not list((tmp_path / "out").iterdir())


def test_digits_are_drawn_from_the_training_side(dense: Path, tmp_path: Path) -> None:
    ids, described = drawn(dense, tmp_path / "out", "calibration.count=1395")
    assert described["shared"] is True
    assert not set(ids) & set(data.for_evaluation("digits", shared=True)[1])
    with pytest.raises(ImagesError, match=r"calibration\.count = 1396, but digits has only 1395 images"):
        drawn(dense, tmp_path / "more", "calibration.count=1396")


def test_a_shared_folder_is_split(dense: Path, pictures: Path, tmp_path: Path) -> None:
    both = [f"calibration.source=imagefolder:{pictures}", f"evaluation.source=imagefolder:{pictures}/"]
    ids, described = drawn(dense, tmp_path / "out", *both, "calibration.count=20")
    assert described["shared"] is True
    assert not set(ids) & set(data.for_evaluation(f"imagefolder:{pictures}", shared=True)[1])


def test_a_copy_of_an_evaluation_image_is_passed_over(dense: Path, pictures: Path, tmp_path: Path) -> None:
    overrides = apart(pictures, tmp_path, 39)
    (tmp_path / "other" / "x.png").write_bytes((pictures / "1/01.png").read_bytes())
    ids, described = drawn(dense, tmp_path / "out", *overrides)
    assert "1/01.png" not in ids
    assert described["duplicates"] in ([], ["1/01.png"])  # met only when drawn
    with pytest.raises(ImagesError, match=r"only 39 images to draw from \(0 corrupt, 1 also used for evaluation\)"):
        drawn(dense, tmp_path / "all", *overrides, "calibration.count=40")


def test_a_corrupt_image_is_refused_by_name(dense: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "1/01.png").write_bytes(b"no image")
    with pytest.raises(ImagesError, match=r"image 1/01\.png cannot be decoded .* set calibration\.corrupt: skip"):
        drawn(dense, tmp_path / "out", *apart(pictures, tmp_path, 40))


def test_corrupt_images_are_skipped_recorded_and_replaced(dense: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "1/01.png").write_bytes((pictures / "1/01.png").read_bytes()[:60])
    skip = ["calibration.corrupt=skip", "calibration.max_skipped=0.1"]
    ids, described = drawn(dense, tmp_path / "out", *apart(pictures, tmp_path, 39), *skip)
    assert len(ids) == 39
    assert described["skipped"] in ([], ["1/01.png"])
    assert "1/01.png" not in ids


def test_too_many_corrupt_images_are_refused(dense: Path, pictures: Path, tmp_path: Path) -> None:
    for path in sorted(pictures.rglob("*.png"))[:30]:
        path.write_bytes(b"")
    with pytest.raises(ImagesError, match=r"max_skipped = 0\.1 of 10 allows 1"):
        drawn(
            dense,
            tmp_path / "out",
            *apart(pictures, tmp_path, 10),
            "calibration.corrupt=skip",
            "calibration.max_skipped=0.1",
        )


def test_a_parquet_file_may_be_drawn_whole(dense: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", 70, {"id": [f"x{n}" for n in range(70)]})
    ids, _ = drawn(dense, tmp_path / "out", f"calibration.source=parquet:{path}", "calibration.count=70")
    assert sorted(ids) == sorted(f"x{n}" for n in range(70))
    assert pq.ParquetFile(tmp_path / "out" / "images.parquet").num_row_groups == 2
