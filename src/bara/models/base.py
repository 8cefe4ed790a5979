"""Base models and tokenisers, loaded only if nothing would be ignored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import transformers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from bara.adapter.heads import SAVED_HEADS
from bara.data.images import ImageTask
from bara.data.question_task import QuestionTask
from bara.data.tasks import TableTask
from bara.data.text_task import TextTask, listed
from bara.errors import BaraError, first_line
from bara.language.tasks import LanguageTask, Task, is_seq2seq
from bara.models.gguf import load_gguf, source
from bara.models.sentence import SentenceClassifier, is_sentence_encoder
from bara.schema import shown

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def auto_class(task: Task) -> Any:
    """The class of transformers whose `from_pretrained` makes a model for the task."""
    return getattr(transformers, task.names.auto_class)


def load_base(
    name: str, task: Task, options: Mapping[str, Any], *, mean_pooled: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """A base model with a head for the task; for a language task with its own.

    A sentence-transformers model becomes a `SentenceClassifier`. For regression the two outputs
    are mean and log-variance (see `bara.gaussian_nll`), and `model.config.target_mean` and
    `target_std` tell `bara.predict` how they become targets: output * std + mean.

    Args:
        name: folder or hub name.
        task: decides the number of outputs and their names.
        options: further arguments of `from_pretrained`.
        mean_pooled: make it a `SentenceClassifier` in any case.

    Returns:
        The model, and the modules that have to be trained and saved with the adapter: those that
        the checkpoint has no weights for besides the head that PEFT saves anyway, and the heads of
        image models.

    Raises:
        BaraError: the model cannot be loaded.
    """
    if is_seq2seq(task):
        return load_seq2seq(name, options), []
    if isinstance(task, LanguageTask):
        return load_causal_lm(name, options), []
    head = _head(task)
    info: dict[str, Any] = {"missing_keys": [], "mismatched_keys": []}
    try:
        if isinstance(task, TextTask) and (mean_pooled or is_sentence_encoder(name)):
            model = SentenceClassifier.from_encoder(name, **head, **options)
        else:
            model, info = auto_class(task).from_pretrained(
                name, **head, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except Exception as error:  # hub, file and configuration errors of many types
        raise BaraError(f"cannot load the base model {name!r}: {first_line(error)}") from error
    if isinstance(task, TextTask) and task.task == "regression":
        model.config.target_mean = task.target_mean
        model.config.target_std = task.target_std
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    modules = sorted({key.rpartition(".")[0] for key in new})
    unexpected = [
        module
        for module in modules
        if module.startswith(f"{model.base_model_prefix}.") and "pooler" not in module
    ]
    if unexpected:
        raise BaraError(
            f"the base model {name!r} has no weights for {len(unexpected)} of its modules (first: "
            f"{unexpected[0]}); give a complete checkpoint"
        )
    if isinstance(task, ImageTask):  # PEFT knows no heads of image models
        return model, heads(model, modules)
    known = SAVED_HEADS[task.names.peft or ""]
    return model, [m for m in modules if not any(m.split(".")[0].endswith(h) for h in known)]


def _head(task: TableTask | ImageTask) -> dict[str, Any]:
    """What a model's configuration says of its outputs."""
    if isinstance(task, QuestionTask):
        return {"num_labels": 2}  # start and end, whatever classes the checkpoint's model had
    head: dict[str, Any] = {"num_labels": task.num_labels}
    if problem := task.names.problem:
        head["problem_type"] = problem
    if task.label_names:
        names = dict(enumerate(task.label_names))
        head |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
    return head


def heads(model: PreTrainedModel, new: Sequence[str]) -> list[str]:
    """The modules beside a model's backbone, and those that its checkpoint has no weights for."""
    beside = [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    within = tuple(f"{name}." for name in beside)
    return [*beside, *(name for name in new if not f"{name}.".startswith(within))]


def load_causal_lm(name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """A language model from a folder, a hub name or a .gguf file, whose weights become `dtype`.

    Raises:
        BaraError: it cannot be loaded, or is no causal language model: its head would be random, or
            it would see the tokens that it is to predict.
    """
    origin = source(name)
    missing: list[str] = []
    try:
        if "gguf_file" in origin:
            model = load_gguf(origin, options)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **origin, output_loading_info=True, **options
            )
            model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    except Exception as error:  # hub, file and configuration errors of many types
        raise BaraError(f"cannot load the base model {name!r}: {first_line(error)}") from error
    reads_both_ways = type(model.config) in MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(model.config, "is_decoder", False) or getattr(model.config, "causal", False)
    )
    if missing or reads_both_ways:
        why = f"it has no weights for {missing[0]}" if missing else "it reads texts both ways"
        raise BaraError(
            f"{name!r} is no causal language model ({why}); give one, or another --task"
        )
    model.name_or_path = name  # PEFT notes it for those who load the adapter
    return model


def load_seq2seq(name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """A model with an encoder and a decoder for texts, from a folder or a hub name.

    Raises:
        BaraError: it cannot be loaded, or lacks weights.
    """
    try:
        loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(
            name, output_loading_info=True, **options
        )
    except Exception as error:  # hub, file and configuration errors of many types
        raise BaraError(f"cannot load the base model {name!r}: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise BaraError(
            f"{name!r} is no sequence-to-sequence model (it has no weights for {missing[0]}); give "
            "one, or another --task"
        )
    return model


def load_processor(name: str) -> Any:
    """What makes a model's inputs of images.

    Raises:
        BaraError: it cannot be loaded.
    """
    try:
        return AutoImageProcessor.from_pretrained(name)
    except Exception as error:  # hub, file and configuration errors of many types
        raise BaraError(
            f"cannot load the image processor of {name!r}: {first_line(error)}"
        ) from error


def load_tokenizer(
    name: str, model: PreTrainedModel, *, words: bool = False
) -> PreTrainedTokenizerBase:
    """The tokeniser, with a padding token that the model knows too.

    Args:
        name: folder, hub name or .gguf file.
        model: gets the padding token.
        words: it is to read lists of words: those of byte-level tokenisers (RoBERTa, GPT-2) have to
            begin with a space, as in a text.

    Raises:
        BaraError: it cannot be loaded, or has nothing to pad with.
    """
    origin = source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **origin, **({"add_prefix_space": True} if words else {})
        )
    except Exception as error:  # hub, file and configuration errors of many types
        raise BaraError(f"cannot load the tokeniser of {name!r}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BaraError(f"the tokeniser of {name!r} has no padding token; set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def require_modules(model: PeftModel, options: Mapping[str, Any]) -> None:
    """Refuses names of modules that match none, which PEFT goes on without.

    Args:
        model: with its adapter.
        options: of the adapter's configuration, as they were given.

    Raises:
        BaraError: a name of `target_modules`, `modules_to_save` or `exclude_modules`, or a key of
            `rank_pattern` or `alpha_pattern`, is no module's (of the patterns: no adapted one's).
    """
    tuner: Any = model.base_model
    adapted = list(tuner.targeted_module_names)
    there = [name for name, _ in model.get_base_model().named_modules()]
    for option in ("target_modules", "modules_to_save", "exclude_modules"):
        named = options.get(option) or ()
        for name in () if isinstance(named, str) else named:
            if not any(f".{module}".endswith(f".{name}") for module in there):
                raise BaraError(f"method_options.{option}: the model has no module {shown(name)}")
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in options.get(option) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in adapted):
                raise BaraError(
                    f"method_options.{option}: {shown(pattern)} is no module that is adapted; "
                    f"those are {listed(sorted({name.rpartition('.')[2] for name in adapted}))}"
                )
