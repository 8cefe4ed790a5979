"""Tasks of language models: tables to token ids with a loss on the completion only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard

from pydantic import ConfigDict

from bara.data.images import ImageTask
from bara.data.task_file import Names, TaskFile
from bara.data.tasks import TableTask
from bara.errors import BaraError
from bara.language.prompts import (
    Prompt,
    encode_completion,
    encode_source,
    render_chat,
    token_ids,
)
from bara.language.question import Question, Scoring
from bara.schema import STRICT

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


LANGUAGE_TASKS = ("causal-lm", "multiple-choice", "seq2seq")
GENERATING_TASKS = ("causal-lm", "seq2seq")


@dataclass(frozen=True)
class LanguageTask(TaskFile):
    """What a language model learns from a table.

    Attributes:
        task: `causal-lm` (columns `prompt` and `completion`, or `messages`, or `text`),
            `multiple-choice` (`question` or `prompt`, `choices`, `answer`) or `seq2seq` (`prompt`,
            which the encoder reads, and `completion`, which the decoder writes).
        max_length: most tokens of a row.
        scoring: for multiple choice, whether the model says the choice's text or its letter.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    task: Literal["causal-lm", "multiple-choice", "seq2seq"]
    max_length: int = 128
    scoring: Scoring = "text"

    def __post_init__(self) -> None:
        if self.scoring not in ("text", "letter"):
            raise BaraError(f"scoring must be 'text' or 'letter', not {self.scoring!r} (--scoring)")
        if self.max_length < 2:
            raise BaraError(
                f"the longest input must be at least 2 tokens, not {self.max_length} (--max-length)"
            )

    @property
    def names(self) -> Names:
        if is_seq2seq(self):
            return Names("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
        return Names("AutoModelForCausalLM", "CAUSAL_LM")

    def inputs(
        self,
        dataset: Dataset,
        tokenizer: Any,
        *,
        labels: bool = True,
        first_row: int = 1,
    ) -> Dataset:
        """`input_ids`, `attention_mask` and `labels`, which are -100 where there is no loss.

        The loss is on the completion and the end-of-text token: of a prompt's completion, of the
        last message of a conversation (which has to be the assistant's), or of a whole `text`. A
        question becomes its prompt and the right choice, as an input to measure on; what trains on
        questions is `bara.language.choice_loss`. For seq2seq the ids are the prompt's and the
        labels the completion's.

        Args:
            dataset: the table.
            tokenizer: the model's tokeniser.
            labels: these inputs always have theirs, which are the texts themselves.
            first_row: the number that messages give to the first row.

        Raises:
            BaraError: a row fits none of these or is longer than `max_length`; the message has its
                number.
        """
        from datasets import Dataset

        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for number, row in enumerate(dataset, start=first_row):
            try:
                if is_seq2seq(self):
                    ids, targets = encode_pair(row, tokenizer)
                    longest = max(len(ids), len(targets))
                else:
                    prompt, completion = _encode(row, tokenizer, self)
                    ids, targets = prompt + completion, [-100] * len(prompt) + completion
                    longest = len(ids)
            except BaraError as error:
                raise BaraError(f"row {number}: {error}") from error
            self.require_length(number, longest)
            columns["input_ids"].append(ids)
            columns["attention_mask"].append([1] * len(ids))
            columns["labels"].append(targets)
        if not columns["labels"]:
            raise BaraError("the data has no rows; give at least one")
        return Dataset.from_dict(columns)

    def require_length(self, number: int, length: int) -> None:
        """Raises BaraError if row `number` is longer than `max_length` tokens."""
        if length > self.max_length:
            raise BaraError(
                f"row {number} has {length} tokens, more than the {self.max_length} of the longest "
                "input: raise that (--max-length, as far as the model's context goes), or shorten "
                "the row"
            )


def is_multiple_choice(task: object) -> TypeGuard[LanguageTask]:
    """Whether a task is to choose among the choices of a question."""
    return isinstance(task, LanguageTask) and task.task == "multiple-choice"


def is_seq2seq(task: object) -> TypeGuard[LanguageTask]:
    """Whether an encoder reads the prompt and a decoder writes the answer."""
    return isinstance(task, LanguageTask) and task.task == "seq2seq"


def questions(dataset: Dataset, *, first_row: int = 1) -> list[Question]:
    """The questions of a table.

    Raises:
        BaraError: a row is not a question; the message has its number.
    """
    return [Question.from_record(row, f"row {first_row + i}") for i, row in enumerate(dataset)]


def prompt_and_completion(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """The text a model is given and the text it is to say; the first is empty for `text`.

    Raises:
        BaraError: the row has none of the columns, or the conversation cannot be used.
    """
    if row.get("messages"):
        messages = _messages(row)
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise BaraError("messages must end with one of the role 'assistant'")
        prompt = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
        whole = render_chat(tokenizer, messages)
        if not whole.startswith(prompt):
            raise BaraError("the chat template does not keep the prompt when an answer follows")
        return prompt, whole[len(prompt) :]
    end = tokenizer.eos_token or ""
    given, completion, text = (row.get(name) for name in ("prompt", "completion", "text"))
    if isinstance(given, str) and isinstance(completion, str) and given and completion:
        return given, completion + end
    if isinstance(text, str) and text.strip():
        return "", text + end
    raise BaraError("give texts under 'prompt' and 'completion', or 'text', or 'messages'")


def encode_pair(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids of `prompt` for an encoder, and of `completion` for a decoder, with its end.

    Raises:
        BaraError: the row lacks one of them.
    """
    given, completion = row.get("prompt"), row.get("completion")
    if not isinstance(given, str) or not isinstance(completion, str) or not completion.strip():
        raise BaraError("give texts under 'prompt' and 'completion'")
    labels = list(tokenizer(text_target=completion)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and labels[-1:] != [end]:
        labels.append(end)
    return encode_source(tokenizer, given), labels


def row_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """What to generate from: `prompt`, or `messages` up to an answer that ends them.

    Raises:
        BaraError: the row has neither; `where` begins the message.
    """
    if row.get("messages"):
        messages = _messages(row, f"{where}: ")
        answered = messages[-1].get("role") == "assistant"
        return messages[:-1] if answered and len(messages) > 1 else messages
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BaraError(f"{where} needs a text under 'prompt', or 'messages'")
    return prompt


def reference(row: Mapping[str, Any], where: str) -> str:
    """The right answer of a row: `completion`, or what the assistant says last.

    Raises:
        BaraError: the row has none; `where` begins the message.
    """
    messages = _messages(row, f"{where}: ") if row.get("messages") else []
    answer = messages[-1].get("content") if len(messages) > 1 else row.get("completion")
    if not isinstance(answer, str):
        raise BaraError(f"{where} needs a 'completion', or 'messages' that end with an answer")
    return answer


def _messages(row: Mapping[str, Any], where: str = "") -> list[Mapping[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise BaraError(f"{where}'messages' must be a list of objects with 'role' and 'content'")
    return messages


def _encode(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, task: LanguageTask
) -> tuple[list[int], list[int]]:
    if task.task == "multiple-choice":
        question = Question.from_record(row, "the question")
        if question.answer is None:
            raise BaraError("the question has no 'answer'")
        end = question.completions(task.scoring)[question.answer]
        return encode_completion(tokenizer, question.prompt(task.scoring), end)
    prompt, completion = prompt_and_completion(row, tokenizer)
    if prompt:
        special = not row.get("messages")  # a chat template writes its own
        return encode_completion(tokenizer, prompt, completion, add_special_tokens=special)
    return [], token_ids(tokenizer, completion)


Task = TableTask | LanguageTask | ImageTask
