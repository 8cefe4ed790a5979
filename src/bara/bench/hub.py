"""The multiple-choice tasks of the Bayesian-LoRA papers, from the Hugging Face hub.

The prompts and splits are those of Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111, appendix) and
BLoB (Wang et al. 2024, arXiv 2406.11675): the answer is a letter, or True or False, and since the
test answers of some of these sets are withheld, the validation split is what they test on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from bara.errors import BaraError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

SELECT = (
    "Select one of the choices that answers the following question: {question} "
    "Choices: {choices} Answer:"
)
TRUE_OR_FALSE = "Answer the question with only True or False: {question} Context: {passage}."


@dataclass(frozen=True)
class HubTask:
    """Where a task is on the hub, and how its rows become prompts.

    Attributes:
        source: repository, and configuration after a colon.
        convert: from a row to `prompt`, `choices` (the answers to score) and `answer` (the position
            of the right one).
    """

    source: str
    convert: Callable[[Mapping[str, Any]], dict[str, Any]]


def load_hub_task(name: str) -> tuple[Dataset, Dataset]:
    """Training and test tables with the columns `prompt`, `choices` and `answer`.

    Raises:
        BaraError: the data set cannot be loaded.
    """
    from datasets import load_dataset

    task = HUB_TASKS[name]
    repository, _, config = task.source.partition(":")
    try:
        data = load_dataset(repository, config or None)
        train, test = data["train"], data["validation"]
    except Exception as error:  # the hub client raises many unrelated types
        raise BaraError(f"cannot load {task.source} from the hub: {first_line(error)}") from error
    return _converted(train, task), _converted(test, task)


def _converted(table: Dataset, task: HubTask) -> Dataset:
    from datasets import Dataset

    # a new table: `map` would keep BoolQ's `answer` a truth value
    return Dataset.from_list([task.convert(row) for row in table])


def select_prompt(question: str, choices: Sequence[str]) -> tuple[str, list[str]]:
    """The papers' prompt for lettered choices, and the letters."""
    letters = list(ascii_uppercase[: len(choices)])
    listed = " ".join(
        f"{letter}. {text.strip().removesuffix('.')}."
        for letter, text in zip(letters, choices, strict=True)
    )
    return SELECT.format(question=question.strip(), choices=listed), letters


def _winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, letters = select_prompt(row["sentence"], [row["option1"], row["option2"]])
    return {"prompt": prompt, "choices": letters, "answer": int(row["answer"]) - 1}


def _science(question: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """ARC and OpenBookQA; their choices are labelled A to E, in some rows 1 to 4."""

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        choices = row["choices"]
        prompt, letters = select_prompt(row[question], choices["text"])
        return {
            "prompt": prompt,
            "choices": letters,
            "answer": list(choices["label"]).index(row["answerKey"]),
        }

    return convert


def _boolq(row: Mapping[str, Any]) -> dict[str, Any]:
    passage = row["passage"].strip().removesuffix(".")
    prompt = TRUE_OR_FALSE.format(question=row["question"].strip(), passage=passage)
    return {"prompt": prompt, "choices": ["False", "True"], "answer": int(row["answer"])}


HUB_TASKS = {
    "winogrande_s": HubTask("allenai/winogrande:winogrande_s", _winogrande),
    "winogrande_m": HubTask("allenai/winogrande:winogrande_m", _winogrande),
    "arc_challenge": HubTask("allenai/ai2_arc:ARC-Challenge", _science("question")),
    "arc_easy": HubTask("allenai/ai2_arc:ARC-Easy", _science("question")),
    "openbookqa": HubTask("allenai/openbookqa:main", _science("question_stem")),
    "boolq": HubTask("google/boolq", _boolq),
}
