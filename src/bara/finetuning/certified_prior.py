"""What the certified mode adds to training: the split of the data, and the prior from a part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from bara.cards.adapter_files import RECIPE_FILE, WEIGHTS_FILE
from bara.certificates.certificate import fitted, not_certified
from bara.data.text_task import TextTask, split_dataset
from bara.errors import BaraError
from bara.finetuning.checkpoints import CHECKPOINTS, newest_checkpoint
from bara.finetuning.load import read_config
from bara.methods.recipe import TrainRecipe
from bara.posteriors.certified import CertifiedConfig

if TYPE_CHECKING:
    from datasets import Dataset

PRIOR_FOLDER = "prior"


def prepare(
    model: PeftModel,
    recipe: TrainRecipe,
    train: Dataset,
    task: TextTask,
    learn: Callable[[TrainRecipe, Dataset], Path] | None,
) -> None:
    """Before training: notes the data to certify on, and learns the prior on the others.

    Args:
        model: with a new certified adapter.
        recipe: of the run.
        train: the table of the run.
        task: its task.
        learn: trains an adapter by a recipe on a table and returns its folder; None where the
            checkpoint of a resumed run will bring the prior.

    Raises:
        BaraError: regression, a class that the prior's part of the table lacks, or a resumed run
            with other rows to certify on.
    """
    if task.task != "classification":
        raise BaraError("method certified: only classifiers can be certified")
    config = model.active_peft_config
    assert isinstance(config, CertifiedConfig)
    rows, prior_rows = _split(train, config.prior_fraction, recipe.seed)
    config.data_digest = _digest(rows, task)
    if learn is None:
        _require_same_rows(Path(recipe.output), config.data_digest)
        return
    if prior_rows is None:
        return
    lacking = set(range(task.num_labels)) - set(task.encode_labels(prior_rows))
    if lacking:
        raise BaraError(
            f"the {len(prior_rows)} texts for the prior have none of the class "
            f"{task.label_names[min(lacking)]!r}; raise their part (--prior-fraction) or give "
            "more texts"
        )
    output = str(Path(recipe.output) / PRIOR_FOLDER)
    options = {"output": output, "method_options.prior_fraction": 0.0, "validation": None}
    options["method_options.kl_weight"] = 1.0  # the certificate does not charge for this KL
    start_from_prior(model, learn(recipe.with_options(options), prior_rows))


def _require_same_rows(output: Path, digest: str) -> None:
    """Holds a resumed run to the rows that it set aside: its prior may have learned any others."""
    checkpoint = newest_checkpoint(output / CHECKPOINTS)
    assert checkpoint is not None  # `check_output` refuses to resume without one
    earlier = read_config(checkpoint)
    if not isinstance(earlier, CertifiedConfig) or earlier.data_digest != digest:
        raise BaraError(
            f"the run in {output} set other rows aside to certify on: resume it with the seed and "
            "the table that it began with (--seed, --data), or start it anew (--overwrite)"
        )


def start_from_prior(model: PeftModel, folder: Path) -> None:
    """Starts a new certified adapter from a trained one, which becomes its prior."""
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS_FILE))
    layers, heads = fitted(model)
    for layer in layers:
        layer.posterior.take_as_prior(layer.b)
    for head in heads:
        head.take_as_prior()


def certification_rows(table: Dataset, task: TextTask, adapter: str | Path) -> Dataset:
    """The rows of the training table that an adapter's prior has not seen.

    Args:
        table: the table that the adapter was trained on.
        task: the adapter's task.
        adapter: its folder.

    Raises:
        BaraError: the adapter is of another method, or the table is another one.
    """
    config = read_config(Path(adapter))
    if not isinstance(config, CertifiedConfig):
        raise not_certified()
    if config.data_digest is None:
        raise BaraError(
            f"{adapter} does not say what data it was trained on; train it with `bara train`"
        )
    seed = TrainRecipe.load(Path(adapter) / RECIPE_FILE).seed
    rows, _ = _split(table, config.prior_fraction, seed)
    if _digest(rows, task) != config.data_digest:
        raise BaraError(
            "these are not the data that the adapter was trained on; a certificate needs the same "
            "table with the same rows in the same order"
        )
    return rows


def _split(table: Dataset, prior_fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """The rows to certify on, and those for the prior."""
    if not prior_fraction:
        return table, None
    # no stratification, which would tie the parts to each other
    return split_dataset(table, prior_fraction, seed=seed)


def _digest(rows: Dataset, task: TextTask) -> str:
    content = json.dumps([task.texts(rows), list(rows[task.label_column])], default=str)
    return hashlib.sha256(content.encode()).hexdigest()
