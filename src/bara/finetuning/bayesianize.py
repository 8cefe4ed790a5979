"""A posterior for a LoRA adapter that was trained elsewhere: no training, a few hundred texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import AutoConfig

from bara.cards.adapter_files import CONFIG_FILE, TOKENIZER_FILE, read_shapes
from bara.cards.loading_code import HEAD
from bara.data.tables import load_table
from bara.data.text_task import TextTask
from bara.errors import BaraError, first_line
from bara.files import require_new
from bara.finetuning.load import attach_adapter, read_config
from bara.finetuning.save import save_adapter
from bara.finetuning.task_inputs import predict_table
from bara.language.evaluation import token_metrics
from bara.language.prompts import context
from bara.language.tasks import LANGUAGE_TASKS, LanguageTask, Task, is_multiple_choice
from bara.methods.laplace import laplace
from bara.methods.recipe import TrainRecipe
from bara.methods.table import METHODS
from bara.methods.tfb import largest_noise, tfb
from bara.models.base import load_base, load_tokenizer
from bara.posteriors.config import BayesianConfig
from bara.prediction.temperature import negative_log_likelihood, set_temperature
from bara.schema import refuse_unknown

if TYPE_CHECKING:
    from datasets import Dataset

WITHOUT_TRAINING = ("tfb", "laplace")
PLAIN = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("megatron_core", "loftq_config", "runtime_config", "qalora_group_size"),
    *("init_lora_weights", "ensure_weight_tying"),
)
"""Fields of `LoraConfig` under which an adapter is y = W x + s B A x, whatever they say."""
BASE_AS_IT_IS = ("gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights alone."""
TASK_TYPES = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm"}
CONTEXT = {TextTask: 512, LanguageTask: 2048}
"""Longest input where nobody says, as far as the model's context goes."""


@dataclass(frozen=True)
class Bayesianized:
    """What `bayesianize` made.

    Attributes:
        folder: the new adapter's.
        method: `tfb` or `laplace`.
        num_texts: rows that it was fitted on.
        noise: TFB's sigma; None for Laplace.
        prior_precision: Laplace's; None for TFB.
        mean_nll, mixture_nll: negative log-likelihood of these rows (for causal-lm, per label
            token), in nats, under the adapter as it was and under the mixture of 10 draws.
    """

    folder: Path
    method: str
    num_texts: int
    noise: float | None
    prior_precision: float | None
    mean_nll: float
    mixture_nll: float


def bayesianize(
    adapter: str | Path,
    data: str | Dataset,
    output: str | Path,
    *,
    method: str = "tfb",
    method_options: Mapping[str, Any] | None = None,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    base_model: str | None = None,
    model_options: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    overwrite: bool = False,
) -> Bayesianized:
    """Gives a plain LoRA adapter, whatever trained it, a posterior around its weights.

    The new folder is one of `bara train`'s: `bara.load_adapter` and the commands take it. The
    weights of the old adapter are its mean. Nothing is trained.

    Args:
        adapter: a folder that PEFT wrote, also through Axolotl, Unsloth or LLaMA-Factory.
        data: a few hundred labelled rows of the task that were not trained on: a table, or what
            `bara.data.tables.load_table` reads.
        output: the new folder.
        method: `tfb` (the largest noise that the loss bears), or `laplace` for classifiers.
        method_options: `tolerance` and `num_anchors` of TFB, `subset`, `structure` and
            `prior_precision` of Laplace.
        task: `classification`, `causal-lm` or `multiple-choice`; by the adapter's `task_type`.
        labels: names of the classes in the order of the head's outputs; needed where the table has
            names that the base model's configuration does not.
        text_column, text_pair_column, label_column: see `bara.data.text_task.TextTask.infer`.
        max_length: longest input in tokens; 512 for classifiers and 2048 for language models, as
            far as the context goes.
        base_model: folder or hub name, if it is not where the adapter says.
        model_options: arguments of the base model's `from_pretrained`, such as `dtype`.
        batch_size: rows times draws in one forward pass.
        seed: of the choice of rows, and of the draws in TFB's search.
        overwrite: replace files in a folder that is not empty.

    Raises:
        BaraError: the adapter is no plain LoRA (DoRA, PiSSA, target_parameters, another method of
            PEFT, ...) or was never trained, the method does not fit the task, the base model or
            the data cannot be used, or the labels do not fit the head.
    """
    folder = Path(adapter)
    if method not in WITHOUT_TRAINING:
        known = " or ".join(WITHOUT_TRAINING)
        raise BaraError(f"the method must be {known}, not {method!r} (--method)")
    chosen = METHODS[method]
    given = dict(method_options or {})
    refuse_unknown(given, {f.name for f in fields(chosen.options)}, f"method {method}")
    options = chosen.own_options(given)
    require_new(output, overwrite)
    config: Any = read_config(folder)
    _require_plain(folder, config)
    kind = _kind(folder, config, task, method)
    name = base_model or config.base_model_name_or_path
    if not name:
        raise BaraError(f"{folder / CONFIG_FILE} names no base model; give it with --base-model")
    if labels and kind != "classification":
        raise BaraError(f"--labels are the classes of a classifier: leave it out for {kind}")
    loading = {"revision": config.revision} if config.revision else {}
    recipe = TrainRecipe(
        model=name,
        data=data if isinstance(data, str) else "",
        output=str(output),
        task=kind,
        method=method,
        method_options={"r": config.r, "lora_alpha": config.lora_alpha, **given},
        model_options={**loading, **(model_options or {})},
        seed=seed,
    )
    columns = (text_column, text_pair_column)
    table = load_table(data, text_columns=columns) if isinstance(data, str) else data
    described: Task
    if kind == "classification":
        described = TextTask.infer(
            table,
            text_column=text_column,
            text_pair_column=text_pair_column,
            label_column=label_column,
            task="classification",
        )
        described = _with_labels(described, table, labels, _head(folder), name, loading)
    else:
        described = LanguageTask(kind)  # type: ignore[arg-type]  # one of these by now
    config.task_type = "SEQ_CLS" if kind == "classification" else "CAUSAL_LM"
    base, _ = load_base(name, described, recipe.model_options)
    whole = (folder / TOKENIZER_FILE).is_file()
    tokenizer = load_tokenizer(str(folder) if whole else name, base)
    room = min(tokenizer.model_max_length, context(base))
    longest = min(max_length or CONTEXT[type(described)], room)
    described = replace(described, max_length=longest)
    model = attach_adapter(base, folder, config, name)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    _require_trained(model, folder)
    if is_multiple_choice(described):
        set_temperature(model, 1.0)  # saved with the task
    if method == "tfb":
        table = table.shuffle(seed=seed).select(range(min(len(table), options.num_anchors)))
    nll = _loss(model, tokenizer, table, described, batch_size, seed)
    before = nll()
    noise, precision = None, None
    if not isinstance(described, TextTask):
        noise = largest_noise(model, nll, tolerance=options.tolerance)
    elif method == "tfb":
        inputs = described.inputs(table, tokenizer)
        noise = tfb(model, inputs, tolerance=options.tolerance, seed=seed, batch_size=batch_size)
    else:
        for part, parameter in model.named_parameters():
            parameter.requires_grad_("modules_to_save" in part)  # how it finds the last layer
        inputs = described.inputs(table, tokenizer)
        precision = laplace(model, inputs, options, batch_size=batch_size)
    after = nll()
    recipe = replace(recipe, max_length=described.max_length)
    save_adapter(output, model, tokenizer, described, recipe)
    return Bayesianized(Path(output), method, len(table), noise, precision, before, after)


def _kind(folder: Path, config: Any, task: str | None, method: str) -> str:
    """The task that was asked for or that the configuration names, if the method is for it."""
    kind = task or TASK_TYPES.get(str(config.task_type))
    if kind is None or kind not in ("classification", *LANGUAGE_TASKS):
        raise BaraError(
            f"{folder} is of task type {config.task_type}: give --task classification, causal-lm "
            "or multiple-choice"
        )
    if method == "laplace" and kind != "classification":
        raise BaraError(
            "laplace predicts with a linearised model, which generates no text: use --method tfb "
            f"for {kind}"
        )
    return kind


def _require_plain(folder: Path, config: PeftConfig) -> None:
    """Refuses what is not y = W x + s B A x on the base model's own weights."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if isinstance(config, BayesianConfig):
        raise BaraError(f"{folder} has a posterior already ({kind})")
    if type(config) is not LoraConfig:
        raise BaraError(f"{folder} is of the method {kind}: bayesianize takes LoRA adapters")
    for field in fields(LoraConfig):
        default: Any = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        value = getattr(config, field.name)
        if field.name not in PLAIN and value != default and value not in (None, False, {}):
            raise BaraError(
                f"{folder} has {field.name} set, which makes it another method than plain LoRA: "
                "bayesianize does not take it"
            )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in BASE_AS_IT_IS:
        raise BaraError(
            f"{folder} has init_lora_weights={start!r}, which changes the base model's weights: "
            "convert it to a plain LoRA adapter first (path_initial_model_for_weight_conversion of "
            "PEFT's save_pretrained)"
        )
    if config.bias != "none":
        raise BaraError(
            f"{folder} also trained biases of the base model (bias={config.bias!r}), which would "
            "have no posterior: bayesianize takes bias='none'"
        )


def _require_trained(model: PeftModel, folder: Path) -> None:
    scales = [p for name, p in model.named_parameters() if "lora_B" in name]
    if not scales:
        raise BaraError(f"{folder} adapts no linear or convolution layer, so nothing can be random")
    if not any(p.any() for p in scales):
        raise BaraError(f"{folder} was not trained: B is zero, so that noise on A does nothing")


def _head(folder: Path) -> int | None:
    """Outputs of the head that was saved with the adapter."""
    shapes = read_shapes(folder).items()
    return next((shape[0] for key, shape in shapes if HEAD.fullmatch(key)), None)


def _with_labels(
    task: TextTask,
    table: Dataset,
    labels: Sequence[str] | None,
    saved: int | None,
    base: str,
    options: Mapping[str, Any],
) -> TextTask:
    """The task with its classes in the order of the head's outputs, which the table cannot tell."""
    known: tuple[str, ...] = ()
    try:
        id2label = getattr(AutoConfig.from_pretrained(base, **options), "id2label", None) or {}
        known = tuple(id2label[index] for index in sorted(id2label))
    except Exception as error:  # hub and file errors of many types
        raise BaraError(f"cannot load the base model {base!r}: {first_line(error)}") from error
    count = saved or len(known)
    if labels is not None:
        if len(labels) != count or len(set(labels)) != count:
            raise BaraError(f"the head has {count} outputs: give --labels as many different names")
        return replace(task, label_names=tuple(labels))
    found = task.label_names
    if hasattr(table.features[task.label_column], "int2str") and len(found) == count:
        return task
    if all(name.isdecimal() for name in found):
        if all(int(name) < count for name in found):
            return replace(task, label_names=tuple(str(i) for i in range(count)))
        raise BaraError(
            f"column {task.label_column!r} has the classes {', '.join(found)}, and the head's "
            f"outputs are 0 to {count - 1}: name the classes in their order with --labels"
        )
    if len(known) == count and set(found) <= set(known):
        return replace(task, label_names=known)
    raise BaraError(
        f"which output of the head is {found[0]!r}? Name the {count} classes in the order of the "
        "outputs, as in --labels negative,positive"
    )


def _loss(
    model: PeftModel, tokenizer: Any, table: Dataset, task: Task, batch_size: int, seed: int
) -> Any:
    """A function: the mixture's negative log-likelihood of the table under the draws in force."""
    options: dict[str, Any] = {
        "num_draws": 10,
        "seed": seed,
        "batch_size": batch_size,
        "progress": False,
    }
    if task.task == "causal-lm":
        inputs = task.inputs(table, tokenizer)
        return lambda: token_metrics(model, inputs, **options)["nll"]

    def nll() -> float:
        predictive = predict_table(model, tokenizer, task, table, **options)
        return float(negative_log_likelihood(predictive))

    return nll
