"""CIFAR-10 as parquet files that `parquet:PATH` reads, from the mosaics of the shared data.

    python benchmarks/cifar_parquet.py --data ../shared/data OUTPUT      # OUTPUT/train.parquet and OUTPUT/test.parquet

10 000 images each, PNG, with ids; the test set with labels, the training set without.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(options.data.resolve()))
    from unpack_cifar import load

    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        images, labels = load(name)
        columns = {"id": [f"{name}/{number:05d}" for number in range(len(images))], "image": [_png(i) for i in images]}
        if name == "test":
            columns["label"] = [int(label) for label in labels]
        pq.write_table(pa.table(columns), options.output / f"{name}.parquet")
        print(f"{options.output / f'{name}.parquet'}: {len(images)} images")


def _png(pixels: object) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")  # type: ignore[arg-type]
    return encoded.getvalue()


if __name__ == "__main__":
    main()
