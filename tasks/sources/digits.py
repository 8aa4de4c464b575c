"""scikit-learn's 1,797 handwritten digits, enlarged to 32x32 RGB: data that needs no network."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 32
_PREFIX = "digits/"


class Digits:
    """Ids `digits/0000` to `digits/1796`, in scikit-learn's order; 10 classes; PNG bytes."""

    name = "digits"

    def ids(self) -> Sequence[str]:
        """All ids."""
        return [f"{_PREFIX}{number:04d}" for number in range(len(self._loaded.target))]

    def files(self) -> Sequence[Path]:
        """None: what it reads is pinned."""
        return ()

    def read(self, image: str) -> bytes:
        """One image as PNG; stored, not compressed, so that its bytes do not depend on a zlib version."""
        pixels = self._loaded.images[int(image.removeprefix(_PREFIX))]  # 0..16
        small = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        encoded = io.BytesIO()
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(encoded, "PNG", compress_level=0)
        return encoded.getvalue()

    def labels(self) -> Mapping[str, int]:
        """The digit shown, by id."""
        return dict(zip(self.ids(), map(int, self._loaded.target), strict=True))

    @cached_property
    def _loaded(self) -> Any:
        from sklearn.datasets import load_digits

        return load_digits()
