"""Token classification: a tag for every word of a text that is given as a list of words."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from bara.data.multi_label_task import class_names, refuse_unseen
from bara.data.task_file import Names, TaskFile
from bara.data.text_task import Column, find_column, label_name
from bara.errors import BaraError
from bara.schema import STRICT, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOKEN_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "pos_tags", "labels")


@dataclass(frozen=True)
class TagTask(TaskFile):
    """What to learn from a table whose rows are lists of words and of their tags.

    Attributes:
        text_column: the column with the words.
        label_column: the column with the tags, one for each word.
        task: `token-classification`.
        label_names: the tags by index.
        max_length: most tokens of a text; longer ones are refused, since their last words would
            go without a tag.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    text_column: Column = "tokens"
    label_column: Column = "tags"
    task: Literal["token-classification"] = "token-classification"
    label_names: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=1)] = 128

    @classmethod
    def infer(
        cls,
        dataset: Dataset,
        *,
        text_column: str | None = None,
        text_pair_column: str | None = None,
        label_column: str | None = None,
        max_length: int = 128,
    ) -> TagTask:
        """Describe the training table, finding out what is not given: `tokens` or `words`; `tags`,
        `ner_tags`, `pos_tags` or `labels`. Tags are sorted; those of a `ClassLabel` keep its order.

        Raises:
            BaraError: a column is not there, or has fewer than two tags.
        """
        if text_pair_column is not None:
            raise BaraError("token-classification has no text pairs: leave out --text-pair-column")
        if max_length < 1:
            raise BaraError(f"max_length must be at least 1, not {max_length}")
        text = find_column(dataset.column_names, text_column, TOKEN_COLUMNS, "text")
        label = find_column(dataset.column_names, label_column, TAG_COLUMNS, "label")
        described = cls(text, label, max_length=max_length)
        found = {tag for tags in described.tags(dataset) for tag in tags}
        names = class_names(dataset, label) or tuple(sorted(found))
        if len(names) < 2:
            raise BaraError(f"column {label!r} needs two different tags or more, not {len(names)}")
        return cls(text, label, label_names=names, max_length=max_length)

    @property
    def names(self) -> Names:
        return Names("AutoModelForTokenClassification", "TOKEN_CLS")

    @property
    def num_labels(self) -> int:
        """Outputs of the model for each token."""
        return len(self.label_names)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The column with the words."""
        return (self.text_column,)

    def words(self, dataset: Dataset, *, first_row: int = 1) -> list[list[str]]:
        """The words of each row.

        Raises:
            BaraError: the column is not there, or a cell is no list of texts that are not empty.
        """
        column = find_column(dataset.column_names, self.text_column)
        rows = list(dataset[column])
        for number, words in enumerate(rows, start=first_row):
            if not isinstance(words, list) or not words or not all(map(_is_word, words)):
                raise BaraError(
                    f"column {column!r} must be a list of words, none of them empty, not "
                    f"{shown(words)} as in row {number}"
                )
        return rows

    def tags(self, dataset: Dataset, *, first_row: int = 1) -> list[list[str]]:
        """The tags of each row's words.

        Raises:
            BaraError: the column is not there, or a cell is no list of one tag for each word.
        """
        column = find_column(dataset.column_names, self.label_column)
        names, rows = class_names(dataset, column), []
        words = self.words(dataset, first_row=first_row)
        for number, tags in enumerate(dataset[column], start=first_row):
            count = len(words[number - first_row])
            if not isinstance(tags, list) or len(tags) != count or None in tags:
                raise BaraError(
                    f"column {column!r} must have a tag for each of the {count} words in row "
                    f"{number}, not {shown(tags)}"
                )
            rows.append([names[tag] if names else label_name(tag) for tag in tags])
        return rows

    def inputs(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: bool = True,
        first_row: int = 1,
    ) -> Dataset:
        """Model inputs for a table: `input_ids`, ..., `word_ids`, and `labels`.

        `word_ids` has the number of the word that a token belongs to, -1 for tokens of none. A
        word's tag is the label of its first token; other tokens have -100, and no part in the loss.

        Args:
            dataset: the table.
            tokenizer: the model's, a fast one.
            labels: whether the rows have tags.
            first_row: the number that messages give to the first row.

        Raises:
            BaraError: the table does not fit the task, a text is too long, or a word is nothing to
                the tokeniser.
        """
        from datasets import Dataset

        if len(dataset) == 0:
            raise BaraError("the data has no rows; give at least one")
        rows = self.words(dataset, first_row=first_row)
        encoded: Any = _encode(rows, tokenizer)
        columns = dict(encoded)
        limit = min(self.max_length, tokenizer.model_max_length)
        word_ids = []
        for i, words in enumerate(rows):
            ids = [-1 if word is None else word for word in encoded.word_ids(i)]
            if len(ids) > limit:
                raise BaraError(
                    f"row {first_row + i} has {len(ids)} tokens, more than the {limit} that the "
                    "model reads: shorten it, or raise --max-length of `bara train`"
                )
            if missing := sorted(set(range(len(words))) - set(ids)):
                raise BaraError(
                    f"row {first_row + i}: the word {shown(words[missing[0]])} is nothing to the "
                    "tokeniser: leave it out"
                )
            word_ids.append(ids)
        columns["word_ids"] = word_ids
        if labels:
            columns["labels"] = self._labels(dataset, word_ids, first_row)
        return Dataset.from_dict(columns)

    def _labels(
        self, dataset: Dataset, word_ids: list[list[int]], first_row: int
    ) -> list[list[int]]:
        index = {name: i for i, name in enumerate(self.label_names)}
        rows = []
        for number, tags in enumerate(self.tags(dataset, first_row=first_row)):
            refuse_unseen(tags, index, self.label_column, first_row + number)
            ids = word_ids[number]
            first = [word >= 0 and word != before for before, word in pairwise([-1, *ids])]
            rows.append(
                [index[tags[w]] if begins else -100 for w, begins in zip(ids, first, strict=True)]
            )
        return rows

    def wrong(self) -> str | None:
        if len(set(self.label_names)) < max(2, len(self.label_names)):
            return "label_names must be two tags or more, each once"
        return None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _encode(rows: list[list[str]], tokenizer: Any) -> Any:
    if not tokenizer.is_fast:
        raise BaraError("token classification needs a fast tokeniser, which knows a token's word")
    return tokenizer(rows, is_split_into_words=True)
