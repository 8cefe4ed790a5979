"""The adapters that a server has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bara.adapter.elbo import Elbo
from bara.cards.adapter_files import CONFIG_FILE
from bara.data.tag_task import TagTask
from bara.data.tasks import TABLE_TASKS
from bara.data.text_task import TextTask
from bara.errors import BaraError
from bara.evaluation.abstention import Threshold, load_threshold, read_thresholds
from bara.evaluation.conformal import FILE as CONFORMAL_FILE
from bara.evaluation.conformal import Conformal, load_conformal
from bara.finetuning.load import load_adapter, read_config, read_task
from bara.language.tasks import LanguageTask, Task
from bara.serving.problems import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TASKS = (*TABLE_TASKS, "causal-lm", "multiple-choice")
"""What a server answers for."""


@dataclass(eq=False)
class Served:
    """An adapter under the name that requests call it by.

    Attributes:
        name: of the adapter on this server.
        folder: where its thresholds are; absolute.
        model, tokenizer, task: what `bara.load_adapter` returned.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerBase
    task: Task
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def generates(self) -> bool:
        """Whether it is a language model."""
        return isinstance(self.task, LanguageTask)

    @property
    def reads(self) -> str | None:
        """The field of a request that has its inputs; None for a language model."""
        if isinstance(self.task, TextTask):
            return "texts" if self.task.text_pair_column is None else "pairs"
        if self.generates:
            return None
        return "tokens" if isinstance(self.task, TagTask) else "questions"

    @property
    def has_rank(self) -> bool:
        """Whether its layers have a posterior whose rank can be told."""
        return Elbo.of(self.model) is not None

    def threshold(self, risk: float, **conditions: Any) -> Threshold:
        """The calibrated threshold for a risk.

        Raises:
            Problem: 400: there is none that was calibrated like this.
        """
        try:
            return load_threshold(self.folder, risk, **conditions)
        except BaraError as error:
            raise Problem(400, self.without_folder(error), param="abstain_at_risk") from error

    def conformal(self, coverage: float, **conditions: Any) -> Conformal:
        """The calibration of prediction sets or intervals.

        Raises:
            Problem: 400: there is none that was made like this, or too small a one.
        """
        try:
            found = load_conformal(self.folder, **conditions)
            found.check(coverage)
        except BaraError as error:
            raise Problem(400, self.without_folder(error), param="coverage") from error
        return found

    def without_folder(self, error: BaraError) -> str:
        """A message about the adapter by its name; no other path is in those about its files."""
        return str(error).replace(str(self.folder), self.name)

    def described(self) -> dict[str, Any]:
        """Its entry in the list of models: OpenAI's fields, and what it is for."""
        task = self.task
        entry = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "bara",
            "task": task.task,
            "has_rank": self.has_rank,
        }
        if self.generates:
            return entry | {"chat": bool(self.tokenizer.chat_template)}
        names = list(getattr(task, "label_names", ()))
        return entry | {"reads": self.reads, "classes": names, "pairs": self.reads == "pairs"}


def load_served(adapters: Sequence[str], *, base_model: str | None = None) -> list[Served]:
    """Loads adapters, and the parameters that their base models have in common once.

    Args:
        adapters: folders, or NAME=FOLDER; the name is the folder's own by default.
        base_model: where the base model of all of them is now.

    Raises:
        BaraError: two adapters of one name, one of another task, or one that cannot be loaded.
    """
    folders: dict[str, Path] = {}
    for given in adapters:
        name, separator, rest = given.partition("=")
        folder = Path(given)
        if separator and not folder.is_dir():
            folder = Path(rest)
        else:
            name = folder.resolve().name
        if name in folders:
            raise BaraError(f"two adapters are called {name!r}: call one NAME={folder}")
        folders[name] = folder
    served: list[Served] = []
    for name, folder in folders.items():
        served.append(load_one(name, folder, served, base_model=base_model))
    return served


def load_one(
    name: str,
    folder: Path,
    others: Sequence[Served],
    *,
    base_model: str | PreTrainedModel | None = None,
) -> Served:
    """Loads an adapter beside others, whose memory it shares as far as their bases are the same.

    Raises:
        BaraError: it is for another task, or cannot be loaded.
    """
    if (task := read_task(folder).task) not in TASKS:
        raise BaraError(f"{folder} is for {task}, which a server does not answer for")
    read_thresholds(folder)  # a damaged file is refused now, not when it is asked for
    if (folder / CONFORMAL_FILE).is_file():
        load_conformal(folder)
    loaded = load_adapter(folder, base_model=base_model)
    one = Served(name, folder.resolve(), *loaded)
    for other in others:
        share_parameters(one.model, other.model)
    return one


def base_of(folder: Path) -> str | None:
    """The name of an adapter's base model; None for a whole model.

    Raises:
        BaraError: the configuration is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    return read_config(folder).base_model_name_or_path


def share_parameters(model: nn.Module, other: nn.Module) -> int:
    """Makes what two models have in common one memory: equal frozen parameters of one name.

    Returns:
        How many numbers the model does not hold on its own any more.
    """
    theirs, saved = dict(other.named_parameters()), 0
    for name, parameter in model.named_parameters():
        same = theirs.get(name)
        if same is None or "lora_" in name or "modules_to_save" in name:
            continue
        if same.data_ptr() != parameter.data_ptr() and _equal(same.data, parameter.data):
            parameter.data = same.data
            saved += parameter.numel()
    return saved


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)
