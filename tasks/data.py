"""Sources of images by their name in params.yaml, how one source is split in two, and their digests."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from heal.errors import ImagesError

HELD_OUT = 0.25
"""Where calibration and evaluation share a source (digits always), this share of the ids is for evaluation."""

DEFAULT_SPLIT = "train"


class Source(Protocol):
    """Images by stable ids. `name` says which source this is, without a path of this machine.

    labels: class indices, or names of classes. files: what it reads and may change while the name
    stays; none for what is pinned.
    """

    @property
    def name(self) -> str: ...

    def ids(self) -> Sequence[str]: ...

    def files(self) -> Sequence[Path]: ...

    def read(self, image: str, /) -> bytes: ...

    def labels(self) -> Mapping[str, int | str] | None: ...


def open_source(spec: str) -> Source:
    """The source that `calibration.source` or `evaluation.source` names. Raises ImagesError."""
    kind, _, rest = spec.partition(":")
    if kind not in _KINDS:
        raise ImagesError(f"source {spec!r} is not one of digits, imagefolder:PATH, parquet:PATH, hf:NAME@COMMIT")
    return _KINDS[kind](rest)


def for_calibration(calibration: str, evaluation: str) -> tuple[Source, list[str]]:
    """The calibration source and the ids to draw from: none of them is an evaluation id."""
    source = open_source(calibration)
    ids = source.ids()
    # Digits are split in any case: the demo's dense model is trained on this side of them.
    split = is_shared(calibration, evaluation) or calibration == "digits"
    return source, [image for image in ids if not (split and is_held_out(image))]


def for_evaluation(evaluation: str, shared: bool) -> tuple[Source, list[str]]:
    """The evaluation source and its ids; `shared`: calibration draws from the same source. Raises ImagesError."""
    source = open_source(evaluation)
    split, ids = shared or evaluation == "digits", source.ids()
    held_out = [image for image in ids if is_held_out(image) or not split]
    if not held_out:
        raise ImagesError(
            f"evaluation.source: {source.name} is calibration.source, too, and of its {len(ids)} images none is among "
            "the one in four that are held out, by their names, for the evaluation; name another source of images"
        )
    return source, held_out


def is_shared(calibration: str, evaluation: str) -> bool:
    """Whether both names mean one source, which is then split between them."""
    return _located(calibration) == _located(evaluation)


class IdsDigest:
    """SHA-256 over images in their order: a line of each one's own digest, its id, and a note on it if there is one."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, image: str, encoded: bytes, note: str = "") -> bytes:
        """Take one in, and give it back."""
        self._digest.update(f"{hashlib.sha256(encoded).hexdigest()}  {image}{note}\n".encode())
        return encoded

    def hex(self) -> str:
        """Of all that were added."""
        return self._digest.hexdigest()


def is_held_out(image: str) -> bool:
    """Whether an id of a shared source is for evaluation: by its hash, so it never changes sides."""
    return int.from_bytes(hashlib.sha256(image.encode()).digest()[:8]) < HELD_OUT * 2**64


def digest(source: Source, ids: Iterable[str] | None = None, labelled: bool = False) -> str:
    """SHA-256 over ids and bytes, in order, and labels if asked; one image in memory at a time."""
    total = IdsDigest()
    labels = (source.labels() or {}) if labelled else {}
    for image in source.ids() if ids is None else ids:
        total.add(image, source.read(image), f"  {labels[image]!r}" if image in labels else "")
    return total.hex()


@dataclass(frozen=True)
class LabelTable:
    """A CSV file of labels: the class index by id, and all its columns by name."""

    path: Path
    labels: Mapping[str, int]
    columns: Mapping[str, Mapping[str, str]]

    def column(self, name: str, ids: Sequence[str]) -> list[str]:
        """One column in the order of the ids. Raises ImagesError."""
        if name not in self.columns:
            raise ImagesError(f"{self.path} has no column {name!r}; it has {', '.join(self.columns)}")
        return [self.columns[name][image] for image in ids]


def read_labels(path: Path, ids: Sequence[str]) -> LabelTable:
    """Labels by id from columns `file` and `label` (or `class_index`).

    Raises ImagesError unless every id has exactly one label that is a class index.
    """
    rows = list(_rows(path))
    by_file = {row["file"]: row for row in rows}
    if len(by_file) < len(rows):
        raise ImagesError(f"{path}: a file is named in two rows; keep one")
    missing = [image for image in ids if image not in by_file]
    if missing:
        raise ImagesError(f"{path} has no row for {len(missing)} of {len(ids)} images, the first is {missing[0]!r}")
    columns = {name: {file: row[name] for file, row in by_file.items()} for name in rows[0]}
    label = "label" if "label" in columns else "class_index"
    return LabelTable(path, {file: _index(row[label], path, file) for file, row in by_file.items()}, columns)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            names = reader.fieldnames or []
            if "file" not in names or not {"label", "class_index"} & set(names):
                raise ImagesError(f"{path} has columns {', '.join(names)}; it needs `file` and `label` (a class index)")
            yield from ({name: row[name] for name in names} for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImagesError(f"{path} cannot be read as a CSV file of labels: {error}") from error


def _index(text: str, path: Path, file: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ImagesError(f"{path}: the label of {file} is {text!r}, not a class index")
    return int(text)


def _located(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    if kind == "hf":
        return spec if ":" in rest else f"{spec}:{DEFAULT_SPLIT}"
    return f"{kind}:{Path(rest).resolve()}" if rest else kind


# Each is imported when it is opened: scikit-learn, pyarrow and datasets take seconds.
def _digits(rest: str) -> Source:
    from tasks.sources.digits import Digits

    return Digits()


def _imagefolder(rest: str) -> Source:
    from tasks.sources.imagefolder import ImageFolder

    return ImageFolder(Path(rest))


def _parquet(rest: str) -> Source:
    from tasks.sources.parquet import Parquet

    return Parquet(Path(rest))


def _hub(rest: str) -> Source:
    from tasks.sources.hub import HubDataset

    repository, _, version = rest.partition("@")
    commit, _, split = version.partition(":")
    return HubDataset(repository, commit, split or DEFAULT_SPLIT)


_KINDS: Mapping[str, Callable[[str], Source]] = {
    "digits": _digits,
    "imagefolder": _imagefolder,
    "parquet": _parquet,
    "hf": _hub,
}
