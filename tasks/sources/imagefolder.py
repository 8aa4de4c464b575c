"""A folder of image files: one folder a class, or flat and unlabeled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from heal.errors import ImagesError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


class ImageFolder:
    """Ids are paths below the folder, with `/`, sorted; hidden files and other suffixes are passed over.

    The class is the first folder of the path: its number if all such folders are numbers, else its
    name. With a file outside any folder there are no labels. Links are followed to files only, and
    only within the folder (others are refused).
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ImagesError(f"imagefolder:{path} is not a folder; give the path of a folder of images")
        self.root = path.resolve()
        self.name = f"imagefolder:{self.root.name}"

    def ids(self) -> Sequence[str]:
        """All ids. Raises ImagesError when there is no image."""
        return self._ids

    def files(self) -> Sequence[Path]:
        """The file of every id."""
        return [self.root / image for image in self._ids]

    def read(self, image: str) -> bytes:
        """The file's bytes. Raises ImagesError when it is not (or no longer) inside the folder."""
        path = self.root / image
        if not path.resolve().is_relative_to(self.root):
            raise ImagesError(f"{self.root}: {image} leaves the folder; put a copy of the file in its place")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImagesError(f"{path} cannot be read: {error.strerror}") from error

    def labels(self) -> Mapping[str, int | str] | None:
        """Class numbers or names by id, or None for a flat folder. Raises ImagesError for two folders of one number."""
        if any("/" not in image for image in self._ids):
            return None
        classes = {image: image.partition("/")[0] for image in self._ids}
        names = set(classes.values())
        if not all(name.isascii() and name.isdigit() for name in names):
            return classes
        if len({int(name) for name in names}) < len(names):
            raise ImagesError(f"{self.root}: two folders stand for one class number; keep one spelling of each")
        return {image: int(name) for image, name in classes.items()}

    @cached_property
    def _ids(self) -> list[str]:
        found = sorted(_images(self.root, ""))
        if not found:
            raise ImagesError(f"{self.root} holds no image ({', '.join(sorted(SUFFIXES))}); check the path")
        return found


def _images(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and entry.is_dir():
                raise ImagesError(f"{entry.path} is a link to a folder, which is not followed; put the folder there")
            if entry.is_dir():
                yield from _images(folder / entry.name, f"{prefix}{entry.name}/")
            elif Path(entry.name).suffix.lower() in SUFFIXES:
                _refuse_unreadable(entry)
                yield prefix + entry.name


def _refuse_unreadable(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink() and not os.path.exists(entry.path):
        raise ImagesError(f"{entry.path} is a link to a file that is not there; fetch it, or remove the link")
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise ImagesError(f"{entry.path!a}: the name is no UTF-8, so it cannot be an id; rename the file") from error
