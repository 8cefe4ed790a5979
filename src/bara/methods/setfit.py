"""SetFit: a sentence encoder tuned by contrast, then logistic regression (arXiv 2209.11055)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from bara.data.text_task import TextTask
from bara.errors import BaraError
from bara.methods.recipe import TrainRecipe
from bara.models.sentence import NORMALISE, SentenceClassifier
from bara.training.trainer import TrainingProgress

if TYPE_CHECKING:
    from datasets import Dataset

Sampling = Literal["oversampling", "undersampling", "unique"]


@dataclass(frozen=True)
class SetfitOptions:
    """Options of the method `setfit`; the defaults are the package's.

    Attributes:
        num_epochs: passes over the pairs of texts, at least 1.
        learning_rate: of the encoder, > 0.
        batch_size: pairs in a step, at least 1.
        sampling_strategy: `oversampling` repeats pairs until there are as many of one class as of
            different ones, `undersampling` leaves some out, `unique` takes every pair once.
        num_iterations: so many pairs of each kind for every text, in place of a strategy.
        max_steps: of the encoder's training; -1 for no bound.
    """

    num_epochs: int = 1
    learning_rate: float = 2e-5
    batch_size: int = 16
    sampling_strategy: Sampling = "oversampling"
    num_iterations: int | None = None
    max_steps: int = -1

    def __post_init__(self) -> None:
        if self.sampling_strategy not in get_args(Sampling):
            known = ", ".join(get_args(Sampling))
            raise BaraError(f"method setfit: sampling_strategy must be one of {known}")
        counts = (self.num_epochs, self.batch_size, self.num_iterations or 1, abs(self.max_steps))
        if min(counts) < 1 or self.learning_rate <= 0:
            raise BaraError(
                "method setfit: num_epochs, batch_size, num_iterations and max_steps must be at "
                "least 1, and learning_rate > 0"
            )


def train_setfit(
    model: SentenceClassifier,
    task: TextTask,
    train: Dataset,
    recipe: TrainRecipe,
    options: SetfitOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Trains the encoder and the head with the package `setfit`, and puts both into the model.

    Args:
        model: gets the weights.
        task: a classification of single texts.
        train: the texts with their labels.
        recipe: gives the base model and the seed.
        options: of the method.
        callbacks: for the encoder's training.

    Raises:
        BaraError: the task has pairs of texts, a class has no text, or the base model does more to
            its hidden states than to average and normalise them.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression

    if task.text_pair_column is not None:
        raise BaraError("method setfit reads single texts: leave out --text-pair-column")
    labels = task.encode_labels(train)
    if missing := sorted(set(range(task.num_labels)) - set(labels)):
        name = task.label_names[missing[0]]
        raise BaraError(f"method setfit: the class {name!r} has no text in the training data")
    device = "cpu" if recipe.training.get("use_cpu") or not torch.cuda.is_available() else "cuda"
    body = SentenceTransformer(recipe.model, device=device)
    body.max_seq_length = task.max_length
    normalises = _normalises(body, recipe.model)
    head = LogisticRegression()
    precision = torch.autocast(device, torch.bfloat16, enabled=bool(recipe.training.get("bf16")))
    logging.getLogger("setfit").setLevel(logging.WARNING)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            SetFitModel(model_body=body, model_head=head),
            TrainingArguments(
                output_dir=folder,
                num_epochs=options.num_epochs,
                body_learning_rate=options.learning_rate,
                batch_size=options.batch_size,
                sampling_strategy=options.sampling_strategy,
                num_iterations=options.num_iterations,
                max_steps=options.max_steps,
                seed=recipe.seed,
                save_strategy="no",
                report_to="none",
                show_progress_bar=False,
            ),
            train_dataset=Dataset.from_dict({"text": task.texts(train)[0], "label": labels}),
            callbacks=[TrainingProgress(), *callbacks],
        )
        for printing in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(printing)
        with precision:
            trainer.train()
    encoder: Any = body[0].auto_model
    weights = {k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler.")}
    model.encoder.load_state_dict(weights)
    setattr(model.config, NORMALISE, normalises)
    weight, bias = torch.as_tensor(head.coef_), torch.as_tensor(head.intercept_)
    if task.num_labels == 2:  # one row, the difference of ours
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)


def _normalises(body: Any, name: str) -> bool:
    """Whether the pipeline divides the mean of the hidden states by its length."""
    kinds = [type(module).__name__ for module in body]
    pooling = body[1].get_config_dict() if kinds[1:2] == ["Pooling"] else {}
    mean = pooling.get("pooling_mode_mean_tokens") or pooling.get("pooling_mode") == "mean"
    if not mean or kinds[2:] not in ([], ["Normalize"]):
        raise BaraError(
            f"method setfit: {name} has the parts {', '.join(kinds)}; only a mean of tokens, "
            "normalised or not, is supported"
        )
    return bool(kinds[2:])
