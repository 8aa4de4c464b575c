"""A dataset of the Hugging Face hub at one commit, read with `datasets` from the local cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from heal.errors import ImagesError


class HubDataset:
    """Ids are `split:row`; the image is the first column of type Image, the label the first ClassLabel.

    The commit's files are downloaded once and then found in the hub's cache, also offline. Nothing
    of the repository is executed. Raises ImagesError.
    """

    def __init__(self, repository: str, commit: str, split: str) -> None:
        self.repository, self.commit, self.split = repository, commit, split
        self.name = f"hf:{repository}@{commit}:{split}"

    def ids(self) -> Sequence[str]:
        """All ids, in the order of the rows."""
        return [f"{self.split}:{row:08d}" for row in range(len(self._rows))]

    def files(self) -> Sequence[Path]:
        """None: what it reads is pinned."""
        return ()

    def read(self, image: str) -> bytes:
        """The encoded bytes of one image."""
        cell = self._rows[int(image.rpartition(":")[2])][self._column(datasets.Image)]
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        path = Path(cell["path"]).resolve()
        if not path.is_relative_to(self._cache):  # a row may name any file of this machine
            raise ImagesError(f"{self.name}: {image} points outside the dataset, to {path}; leave this dataset alone")
        return path.read_bytes()

    def labels(self) -> Mapping[str, int] | None:
        """Class indices by id, -1 where the class is unknown; None without a column of type ClassLabel."""
        if not any(isinstance(kind, datasets.ClassLabel) for kind in self._rows.features.values()):
            return None
        found = self._rows[self._column(datasets.ClassLabel)]
        return {image: -1 if label is None else int(label) for image, label in zip(self.ids(), found, strict=True)}

    @cached_property
    def _rows(self) -> Any:
        try:
            loaded = datasets.load_dataset(str(self._snapshot), split=self.split)
        except (DatasetsError, ValueError, OSError) as error:
            raise ImagesError(f"{self.name} cannot be read: {error}; check the split") from error
        column = next((name for name, kind in loaded.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise ImagesError(f"{self.name} has no column of images (it has {', '.join(loaded.features)})")
        return loaded.cast_column(column, datasets.Image(decode=False))

    def _column(self, kind: type) -> str:
        features: Mapping[str, object] = self._rows.features
        return next(name for name, feature in features.items() if isinstance(feature, kind))

    @cached_property
    def _cache(self) -> Path:
        """The repository's folder in the hub's cache: snapshots link to blobs inside it."""
        return self._snapshot.parents[1].resolve()

    @cached_property
    def _snapshot(self) -> Path:
        try:
            return self._found(local_files_only=True)
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):
            return self._fetched()

    def _fetched(self) -> Path:
        try:
            return self._found(local_files_only=False)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise ImagesError(
                f"{self.name} is not in the local cache and cannot be fetched ({type(error).__name__}); fetch it once "
                f"with a connection: hf download {self.repository} --repo-type dataset --revision {self.commit}"
            ) from error

    def _found(self, local_files_only: bool) -> Path:
        folder = snapshot_download(
            self.repository, repo_type="dataset", revision=self.commit, local_files_only=local_files_only
        )
        return Path(str(folder))
