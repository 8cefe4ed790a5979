"""What is learned from images: folders of classes or tables of files, and the model's inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

from bara.data.tables import load_table, refuse_split
from bara.data.task_file import Names, TaskFile
from bara.data.text_task import LABEL_COLUMNS, Column, TextTask
from bara.errors import BaraError, first_line
from bara.schema import STRICT, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

IMAGE_TASK = "image-classification"
IMAGE_COLUMNS = ("image", "file", "file_name")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageTask(TaskFile):
    """What to learn from images.

    Attributes:
        label_names: the classes by index.
        label_column: the column with the classes; that of a folder is `label`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    label_names: tuple[str, ...]
    label_column: Column = "label"
    task: Literal["image-classification"] = "image-classification"

    def __post_init__(self) -> None:
        if len(set(self.label_names)) < max(2, len(self.label_names)):
            raise BaraError("label_names must be two different classes or more")

    @classmethod
    def infer(cls, table: Dataset, *, label_column: str | None = None) -> ImageTask:
        """Describes a training table that `image_table` read.

        Raises:
            BaraError: there are no classes, or fewer than two.
        """
        found = TextTask.infer(
            table, text_column="image", label_column=label_column, task="classification"
        )
        return cls(found.label_names, found.label_column)

    @property
    def names(self) -> Names:
        return Names("AutoModelForImageClassification", None, "single_label_classification")

    @property
    def num_labels(self) -> int:
        """Outputs of the model."""
        return len(self.label_names)

    def inputs(
        self, dataset: Dataset, tokenizer: Any, *, labels: bool = True, first_row: int = 1
    ) -> Dataset:
        """`image_inputs` of the rows of `image_table`.

        Args:
            dataset: the table.
            tokenizer: the model's image processor.
            labels: whether the rows have classes.
            first_row: the number that messages give to the first row.

        Raises:
            BaraError: as `image_inputs`.
        """
        return image_inputs(dataset, tokenizer, self if labels else None, first_row=first_row)

    def encode_labels(self, table: Dataset, *, first_row: int = 1) -> list[int]:
        """Class indices, one per row.

        Raises:
            BaraError: a label is missing or unseen in training.
        """
        text = TextTask(label_column=self.label_column, label_names=self.label_names)
        return [int(label) for label in text.encode_labels(table, first_row=first_row)]


def load_images(
    source: str | Path,
    processor: Any,
    *,
    label_names: Sequence[str] | None = None,
    label_column: str | None = None,
    split: str | None = None,
) -> Dataset:
    """Images as `bara.predict`, `bara.evaluate` and `Trainer` take them, each read when its turn
    comes.

    Args:
        source: a folder with a folder of images for each class, or of images without classes; or a
            table (see `bara train`) or hub data set with files, relative to the table's folder, or
            images in a column `image`, `file` or `file_name`.
        processor: the model's, such as `AutoImageProcessor.from_pretrained` gives.
        label_names: the model's classes by index (`task.label_names` of `bara.load_adapter`); None
            takes those that are found, sorted.
        label_column: of a table, if it has another name than `label`, `labels` or `target`.
        split: of a hub data set.

    Returns:
        Rows with `pixel_values`, and with `labels` where there are classes, whose names are in
        `features["labels"].names`. For `Trainer` set `remove_unused_columns=False`: the rows are
        made of a column `image`.

    Raises:
        BaraError: there are no images, a file is missing or no image, or a class is unknown.
    """
    table = image_table(source, split=split)
    usual = (name for name in LABEL_COLUMNS if name in table.column_names)
    label = label_column or next(usual, None)
    if label is None:
        return image_inputs(table, processor, None)
    if label_names is None:
        return image_inputs(table, processor, ImageTask.infer(table, label_column=label))
    labelled = label in table.column_names
    task = ImageTask(tuple(label_names), label) if labelled else None
    return image_inputs(table, processor, task)


def image_table(source: str | Path, *, split: str | None = None) -> Dataset:
    """The images of a folder or a table, not yet opened: a column `image`, and the others.

    Raises:
        BaraError: there are no images, a file that the table names is missing, or there is a split
            of what is here.
    """
    from datasets import Dataset

    folder = Path(source)
    refuse_split(source, split)
    if folder.is_dir():
        return Dataset.from_dict(_listed(folder))
    table = load_table(source, split=split, text_columns=IMAGE_COLUMNS)
    return located(table, folder.parent if folder.is_file() else Path())


def located(table: Dataset, folder: Path) -> Dataset:
    """A table with a column `image`, whose files are found from the folder.

    Raises:
        BaraError: there is no such column, or a file is missing.
    """
    column = next((name for name in IMAGE_COLUMNS if name in table.column_names), None)
    if column is None:
        names = ", ".join(map(shown, table.column_names))
        raise BaraError(f"which column has the images? Name it 'image'; the columns are {names}")
    if column != "image":
        table = table.rename_column(column, "image")
    values = table["image"][:] if table.features["image"].dtype == "string" else []
    for row, value in enumerate(values, start=1):
        if not value or not (folder / value).is_file():
            raise BaraError(f"row {row}: there is no image file {shown(value)} in {folder}")
    if not values:
        return table
    files = [str(folder / value) for value in values]
    return table.rename_column("image", "named").add_column("image", files).remove_columns("named")


def image_inputs(
    table: Dataset, processor: Any, task: ImageTask | None, *, first_row: int = 1
) -> Dataset:
    """The rows of `image_table` as a model reads them.

    Args:
        table: its rows.
        processor: the model's.
        task: decides the labels; None leaves them out.
        first_row: the number that messages give to the first row.

    Raises:
        BaraError: the labels do not fit the task; later, where a row is read, its file is no image.
    """
    from datasets import ClassLabel

    rows = table.select_columns(["image"])
    if task is not None:
        rows = rows.add_column("labels", task.encode_labels(table, first_row=first_row))
        rows = rows.cast_column("labels", ClassLabel(names=list(task.label_names)))

    def read(batch: Mapping[str, Any]) -> dict[str, Any]:
        images = [opened(image) for image in batch["image"]]
        made = {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}
        return made | ({"labels": batch["labels"]} if "labels" in batch else {})

    return rows.with_transform(read)


def opened(image: str | Image) -> Image:
    """An image in RGB, from a file or as it is, turned as a camera noted it.

    Raises:
        BaraError: the file is missing or no image.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, (str, Image.Image)):
        raise BaraError(f"an image is a file's name or a picture, not {shown(image)}")
    try:
        if isinstance(image, str):
            with Image.open(image) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
        return image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise BaraError(f"{image} is not a readable image: {first_line(error)}") from error


def _listed(folder: Path) -> dict[str, list[str]]:
    """The images of a folder by class, or all of a folder without classes.

    Not by the `imagefolder` of datasets, for which folders with names such as `test` are splits.
    """
    classes = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
    images = {name: _images(folder / name) for name in (classes or [""])}
    if classes and _images(folder):
        raise BaraError(f"{folder} has both images and folders; give each class a folder")
    if empty := next((name for name, files in images.items() if not files), None):
        raise BaraError(f"{folder / empty} has no images ({', '.join(SUFFIXES)})")
    files = [file for name in images for file in images[name]]
    if not files:
        raise BaraError(f"{folder} has no images ({', '.join(SUFFIXES)})")
    if not classes:
        return {"image": files}
    return {"image": files, "label": [name for name in images for _ in images[name]]}


def _images(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in _visible(folder) if entry.is_file())
    return [str(folder / name) for name in names if name.lower().endswith(SUFFIXES)]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]
