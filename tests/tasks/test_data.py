"""Sources: stable ids, bytes as they are, labels by one rule, digests of contents, no way out of the folder."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from heal.errors import ImagesError
from tasks import data
from tests.tasks.pictures import folder, picture, table

NAMES = ["b/2.png", "a/1.PNG", "a/x/3.jpg", "c/0.webp"]


def test_digits_are_the_1797_of_scikit_learn() -> None:
    source = data.open_source("digits")
    ids = source.ids()
    assert (len(ids), ids[0], ids[-1]) == (1797, "digits/0000", "digits/1796")
    labels = source.labels()
    assert labels is not None
    assert labels["digits/0000"] == 0
    assert sorted(set(labels.values())) == list(range(10))
    with Image.open(io.BytesIO(source.read("digits/0000"))) as image:
        assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
        assert np.asarray(image).max() > 200


def test_a_shared_source_is_split_by_the_hash_of_the_id() -> None:
    _, drawn_from = data.for_calibration("digits", "digits")
    _, judged_on = data.for_evaluation("digits", shared=True)
    assert len(drawn_from) + len(judged_on) == 1797
    assert not set(drawn_from) & set(judged_on)
    assert len(judged_on) == 402  # a change moves images between training and test: every number changes


def test_the_side_of_an_id_depends_on_nothing_else(tmp_path: Path) -> None:
    few = folder(tmp_path / "few", [f"{n}.png" for n in range(20)])
    more = folder(tmp_path / "more", [f"{n}.png" for n in range(60)])
    spec = [f"imagefolder:{few}", f"imagefolder:{more}"]
    sides = [set(data.for_evaluation(name, shared=True)[1]) for name in spec]
    assert sides[0] == {image for image in sides[1] if int(image[:-4]) < 20}


def test_a_shared_source_that_leaves_nothing_to_judge_by_is_refused(tmp_path: Path) -> None:
    images = [f"{n}.png" for n in range(20) if not data.is_held_out(f"{n}.png")][:4]
    few = folder(tmp_path / "few", images)
    assert len(data.for_evaluation(f"imagefolder:{few}", shared=False)[1]) == 4
    with pytest.raises(ImagesError, match=r"of its 4 images none is among the one in four .* name another source"):
        data.for_evaluation(f"imagefolder:{few}", shared=True)


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{0}/../few", "{0}/."])
def test_two_spellings_of_one_folder_are_one_source(tmp_path: Path, spelling: str) -> None:
    few = folder(tmp_path / "few", ["0.png"])
    assert data.is_shared(f"imagefolder:{few}", "imagefolder:" + spelling.format(few))
    assert not data.is_shared(f"imagefolder:{few}", f"parquet:{few}")


def test_the_default_split_spelled_out_is_the_same_source() -> None:
    commit = "a" * 40
    assert data.is_shared(f"hf:x/y@{commit}", f"hf:x/y@{commit}:train")
    assert not data.is_shared(f"hf:x/y@{commit}", f"hf:x/y@{commit}:test")


def test_a_folder_is_read_sorted_and_recursively(tmp_path: Path) -> None:
    root = folder(tmp_path, [*NAMES, ".hidden/4.png", "a/.5.png"])
    (root / "a" / "notes.txt").write_text("no image")
    source = data.open_source(f"imagefolder:{root}")
    assert list(source.ids()) == ["a/1.PNG", "a/x/3.jpg", "b/2.png", "c/0.webp"]
    assert source.read("b/2.png") == (root / "b/2.png").read_bytes()
    assert source.labels() == {"a/1.PNG": "a", "a/x/3.jpg": "a", "b/2.png": "b", "c/0.webp": "c"}
    assert source.name == f"imagefolder:{root.name}"


def test_numbered_folders_are_the_class_indices(tmp_path: Path) -> None:
    source = data.open_source(f"imagefolder:{folder(tmp_path, ['0007/a.png', '0123/b.png'])}")
    assert source.labels() == {"0007/a.png": 7, "0123/b.png": 123}


def test_two_folders_for_one_class_number_are_refused(tmp_path: Path) -> None:
    source = data.open_source(f"imagefolder:{folder(tmp_path, ['7/a.png', '07/b.png'])}")
    with pytest.raises(ImagesError, match="one class number"):
        source.labels()


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    assert data.open_source(f"imagefolder:{folder(tmp_path, ['a.png', 'b/c.png'])}").labels() is None


@pytest.mark.parametrize(
    "spec", ["imagefolder:{0}/none", "imagefolder:{0}/empty", "parquet:{0}/none", "parquet:{0}/empty", "zip:x"]
)
def test_what_is_not_there_is_refused(tmp_path: Path, spec: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImagesError):
        data.open_source(spec.format(tmp_path)).ids()


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture(0))
    root = folder(tmp_path / "root", ["a/1.png"])
    os.symlink(outside, root / "a/2.png")
    os.symlink(root / "a/1.png", root / "a/3.png")
    source = data.open_source(f"imagefolder:{root}")
    assert source.read("a/3.png") == source.read("a/1.png")
    for image in ("a/2.png", "../secret.png", str(outside)):
        with pytest.raises(ImagesError, match="leaves the folder"):
            source.read(image)
    os.symlink(tmp_path, root / "b")
    with pytest.raises(ImagesError, match="link to a folder"):
        data.open_source(f"imagefolder:{root}").ids()


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", ["a/1.png"])
    os.symlink(root / "annex" / "2.png", root / "a/2.png")
    with pytest.raises(ImagesError, match=r"a/2\.png is a link to a file that is not there"):
        data.open_source(f"imagefolder:{root}").ids()


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", ["a/1.png"])
    os.rename(root / "a/1.png", os.fsencode(root) + b"/a/\xff.png")
    with pytest.raises(ImagesError, match=r"the name is no UTF-8"):
        data.open_source(f"imagefolder:{root}").ids()


def test_parquet_files_are_read_in_order_with_their_ids_and_labels(tmp_path: Path) -> None:
    table(tmp_path / "0.parquet", 5, {"id": [f"x{n}" for n in range(5)], "label": [4, 3, 2, 1, 0]})
    table(tmp_path / "1.parquet", 3, {"id": ["y0", "y1", "y2"], "label": [0, 0, 1]}, first=5)
    source = data.open_source(f"parquet:{tmp_path}")
    assert list(source.ids()) == ["x0", "x1", "x2", "x3", "x4", "y0", "y1", "y2"]
    assert [source.read(image) for image in ("y2", "x4", "x0")] == [picture(7), picture(4), picture(0)]
    labels = source.labels()
    assert labels is not None
    assert (labels["x0"], labels["y2"]) == (4, 1)


def test_parquet_without_ids_or_labels_numbers_its_rows(tmp_path: Path) -> None:
    source = data.open_source(f"parquet:{table(tmp_path / 'a.parquet', 2)}")
    assert list(source.ids()) == ["a:00000000", "a:00000001"]
    assert source.labels() is None


def test_parquet_as_datasets_writes_it_is_read(tmp_path: Path) -> None:
    rows = [{"bytes": picture(1), "path": "/etc/passwd"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    assert data.open_source(f"parquet:{tmp_path / 'a.parquet'}").read("a:00000000") == picture(1)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": ["x", "x"]}, "there twice"),
        ({"label": [0, -1]}, "not a class index"),
        ({"label": ["a", "b"]}, "not a class index"),
    ],
)
def test_parquet_tables_that_contradict_themselves_are_refused(
    tmp_path: Path, columns: dict[str, list[object]], expected: str
) -> None:
    source = data.open_source(f"parquet:{table(tmp_path / 'a.parquet', 2, columns)}")
    with pytest.raises(ImagesError, match=expected):
        _ = source.ids(), source.labels()


@pytest.mark.parametrize("column", ["id", "label"])
def test_parquet_that_is_damaged_in_one_column_names_it(tmp_path: Path, column: str) -> None:
    path = table(tmp_path / "a.parquet", 2, {"id": ["x", "y"], "label": [0, 1]})
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema == column)
    start, written = chunk.dictionary_page_offset or chunk.data_page_offset, bytearray(path.read_bytes())
    written[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(written))
    source = data.open_source(f"parquet:{path}")
    with pytest.raises(ImagesError, match=f"column {column} cannot be read"):
        _ = source.ids(), source.labels()


def test_parquet_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ImagesError, match="cannot be read as parquet"):
        data.open_source(f"parquet:{tmp_path / 'a.parquet'}").ids()
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "b.parquet")
    with pytest.raises(ImagesError, match="no column `image`"):
        data.open_source(f"parquet:{tmp_path / 'b.parquet'}").ids()
    pq.write_table(pa.table({"image": [None, {"bytes": None, "path": "/etc/passwd"}]}), tmp_path / "c.parquet")
    source = data.open_source(f"parquet:{tmp_path / 'c.parquet'}")
    for image in source.ids():
        with pytest.raises(ImagesError, match="holds no bytes"):
            source.read(image)


def _digest(root: Path) -> str:
    return data.digest(data.open_source(f"imagefolder:{root}"))


def test_the_digest_is_of_ids_and_bytes_not_of_places_and_times(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", NAMES), folder(tmp_path / "two", NAMES)
    before = _digest(one)
    os.utime(two / NAMES[0], (0, 0))
    assert _digest(two) == before
    stat = (one / NAMES[0]).stat()
    (one / NAMES[0]).write_bytes(picture(99))
    os.utime(one / NAMES[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert _digest(one) != before
    (two / NAMES[0]).rename(two / "b/renamed.png")
    assert _digest(two) != before


def test_labels_that_are_read_are_part_of_the_digest(tmp_path: Path) -> None:
    digests = []
    for labels in ([4, 3], [4, 2]):
        table(tmp_path / "0.parquet", 2, {"id": ["x", "y"], "label": labels})
        source = data.open_source(f"parquet:{tmp_path}")
        digests.append((data.digest(source), data.digest(source, labelled=True)))
    assert digests[0][0] == digests[1][0] and digests[0][1] != digests[1][1]


def test_only_what_both_name_is_split() -> None:
    assert not data.is_shared("digits", "imagefolder:pictures") and data.is_shared("digits", "digits")


def test_the_digest_equals_its_definition(tmp_path: Path) -> None:
    source = data.open_source(f"imagefolder:{folder(tmp_path, ['b.png', 'a.png'])}")
    lines = "".join(f"{hashlib.sha256(source.read(image)).hexdigest()}  {image}\n" for image in ("a.png", "b.png"))
    assert data.digest(source) == hashlib.sha256(lines.encode()).hexdigest()


def test_labels_come_from_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("\ufefffile,class_index,subset\nb.png,3,hard\na.png,0,easy\nother.png,9,easy\n", encoding="utf-8")
    found = data.read_labels(path, ["a.png", "b.png"])
    assert found.labels == {"b.png": 3, "a.png": 0, "other.png": 9}
    assert found.column("subset", ["a.png", "b.png"]) == ["easy", "hard"]
    with pytest.raises(ImagesError, match="no column 'sub'"):
        found.column("sub", ["a.png"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,label\na.png,0\n", "no row for 1 of 2 images, the first is 'b.png'"),
        ("file,label\na.png,0\nb.png,cat\n", "'cat', not a class index"),
        ("file,label\na.png,0\nb.png\n", "'', not a class index"),
        ("file,label\na.png,0\na.png,1\nb.png,0\n", "two rows"),
        ("name,label\na.png,0\n", "it needs `file`"),
        ("", "it needs `file`"),
    ],
)
def test_a_table_of_labels_must_be_whole(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ImagesError, match=expected):
        data.read_labels(path, ["a.png", "b.png"])


def test_a_table_of_labels_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ImagesError, match="cannot be read"):
        data.read_labels(tmp_path / "none.csv", [])


COMMIT = "0123456789abcdef0123456789abcdef01234567"

HUB = """
import json, sys
from tasks import data
from heal.errors import ImagesError
try:
    source = data.open_source(sys.argv[1])
    print(json.dumps([list(source.ids()), [len(source.read(i)) for i in source.ids()], source.labels()]))
except ImagesError as error:
    print(error)
"""


def hub(cache: Path, spec: str) -> str:
    """In a process of its own: the hub's library reads where its cache is once."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, spec], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()[-1]


def test_a_dataset_of_the_hub_is_read_from_the_cache_at_its_commit(tmp_path: Path) -> None:
    import datasets

    repository = tmp_path / "hub" / "datasets--some--birds"
    snapshot = repository / "snapshots" / COMMIT
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["crow", "wren"])})
    rows = {"picture": [{"bytes": picture(n), "path": None} for n in range(3)], "kind": [1, 0, None]}
    (snapshot / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(snapshot / "data" / "train-00000-of-00001.parquet")
    assert hub(tmp_path, f"hf:some/birds@{COMMIT}") == (
        f'[["train:00000000", "train:00000001", "train:00000002"], {[len(picture(n)) for n in range(3)]}, '
        '{"train:00000000": 1, "train:00000001": 0, "train:00000002": -1}]'
    )
    assert "not in the local cache" in hub(tmp_path, f"hf:some/birds@{'f' * 40}")
    assert "cannot be read" in hub(tmp_path, f"hf:some/birds@{COMMIT}:validation")
