"""From encoded bytes to the pixels that a network was trained on: one value, kept in every bundle."""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heal.errors import ImagesError

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROPS = ("center", "squash")

# What Pillow's decoders raise for bytes that are not, or only partly, an image.
_UNDECODABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input.

    size: (height, width) in pixels. mean, std: of each channel, for pixels in [0, 1].
    resize: the short side in pixels before the crop; None for the smallest that covers `size`.
    crop: "center" keeps the aspect ratio and takes the middle; "squash" resizes both sides.
    interpolation: Pillow's, antialiased. Raises ImagesError for values outside these.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | None = None
    crop: str = "center"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            known = ", ".join(INTERPOLATIONS)
            raise ImagesError(
                f"preprocessing: interpolation {self.interpolation!r} is not one of {known}; "
                "set dense.preprocessing.interpolation"
            )
        if self.crop not in CROPS:
            raise ImagesError(
                f"preprocessing: crop {self.crop!r} is not one of {', '.join(CROPS)}; set dense.preprocessing.crop"
            )
        if min(self.size) < 1 or not all(value > 0 for value in self.std):
            raise ImagesError(f"preprocessing: size {self.size} and std {self.std} must be positive")
        if self.resize is not None and self.resize < max(self.size):
            raise ImagesError(f"preprocessing: resize {self.resize} is smaller than the size {self.size} to crop")

    def pixels(self, encoded: bytes) -> NDArray[np.uint8]:
        """The image's pixels, uint8 [height, width, 3]. Raises ImagesError when it cannot be decoded."""
        image = decode(encoded)
        width, height = self._scaled(*image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        left, top = round((width - self.size[1]) / 2), round((height - self.size[0]) / 2)
        cropped = image.crop((left, top, left + self.size[1], top + self.size[0]))
        return np.asarray(cropped, dtype=np.uint8)

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before the crop; the long side is cut down to an integer, as torchvision does."""
        rows, columns = self.size
        if self.crop == "squash":
            factor = 1.0 if self.resize is None else self.resize / min(self.size)
            return math.floor(columns * factor), math.floor(rows * factor)
        if self.resize is None and columns * height > rows * width:
            return columns, max(rows, height * columns // width)
        if self.resize is None and columns * height < rows * width:
            return max(columns, width * rows // height), rows
        short = self.resize or min(self.size)
        return (short, short * height // width) if width <= height else (short * width // height, short)


def parse(described: Mapping[str, Any] | None) -> Preprocessing:
    """What `described` wrote, for example in bundle.json. Raises ImagesError."""
    known = {field.name for field in fields(Preprocessing)}
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in (described or {}).items()
    }
    missing = [key for key in ("size", "mean", "std") if given.get(key) is None]
    if missing:
        raise ImagesError(f"preprocessing lacks {', '.join(missing)}; set dense.preprocessing.{missing[0]}")
    unknown = sorted(given.keys() - known)
    if unknown:
        raise ImagesError(f"preprocessing has {unknown[0]!r}, which is unknown; known: {', '.join(sorted(known))}")
    return Preprocessing(**given)


def decode(encoded: bytes) -> Image.Image:
    """The whole image as RGB: the first frame, transparency dropped, 16 bits scaled to 8. Raises ImagesError."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if image.mode.startswith("I;16"):
                return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (*_UNDECODABLE, Image.DecompressionBombError) as error:
        raise ImagesError(f"cannot be decoded ({type(error).__name__}: {error})") from error
