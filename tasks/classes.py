"""The classes that a network tells apart, and labels brought to their indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heal import bundle
from heal.errors import ImagesError
from heal.naming import nearest
from tasks import artifacts

if TYPE_CHECKING:
    from tasks.data import Source


@dataclass(frozen=True)
class Classes:
    """How many there are, and their names in the order of the logits where these are known."""

    count: int
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, dense: Path) -> Classes:
        """Those of the dense stage's artifact."""
        names = bundle.read(dense / "bundle")["class_names"]
        return cls(artifacts.read_json(dense / "dense.json")["classes"], None if names is None else tuple(names))

    def of_source(self, source: Source, fallback: Callable[[str], None] | None = None) -> dict[str, int] | None:
        """Class indices by id, by the source's own labels; None where it has none. Raises ImagesError."""
        labels = source.labels()
        return None if labels is None else self.indices(labels, source.name, fallback)

    def indices(
        self, labels: Mapping[str, int | str], origin: str, fallback: Callable[[str], None] | None = None
    ) -> dict[str, int]:
        """Class indices by id. A name counts by its place among the classes' names; where these are unknown by
        its rank among the labels, if there is one for every class, which `fallback` is told.

        Raises ImagesError for a label that the network has no class for.
        """
        names = {label for label in labels.values() if isinstance(label, str)}
        places = self._places(names, origin)
        if names and self.names is None and fallback is not None:
            fallback(
                f"{origin} names its classes and the network does not: taken in alphabetical order, from "
                f"{min(names)} = 0 to {max(names)} = {len(names) - 1}; dense.class_names would say it for sure"
            )
        found = {image: places[label] if isinstance(label, str) else label for image, label in labels.items()}
        beyond = next((image for image, index in found.items() if not 0 <= index < self.count), None)
        if beyond is not None:
            raise ImagesError(
                f"{origin}: the label of {beyond} is {found[beyond]}, but the network has {self.count} classes, 0 to "
                f"{self.count - 1}; check the labels and dense.source"
            )
        return found

    def _places(self, names: set[str], origin: str) -> dict[str, int]:
        if self.names is not None:
            known = {name: index for index, name in enumerate(self.names)}
            unknown = sorted(names - known.keys())
            if unknown:
                raise ImagesError(f"{origin}: the network has no class {unknown[0]!r}; {nearest(unknown[0], known)}")
            several = next((name for name in sorted(names) if self.names.count(name) > 1), None)
            if several is not None:
                raise ImagesError(
                    f"{origin}: the network has {self.names.count(several)} classes called {several!r}, and a label of "
                    "that name does not say which; use class numbers (evaluation.labels takes a CSV file of them)"
                )
            return known
        if names and len(names) != self.count:
            raise ImagesError(
                f"{origin} names {len(names)} classes, the network has {self.count}: which is which is unknown. Name "
                "them all in dense.class_names, or use class numbers (evaluation.labels takes a CSV file of them)"
            )
        return {name: rank for rank, name in enumerate(sorted(names))}
