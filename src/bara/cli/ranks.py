"""`bara ranks`: how much of its rank an adapter uses, where, and for which inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from bara.cli.options import Adapter, BaseModel, BatchSize, Seed, Split
from bara.schema import MAX_DRAWS

PLAIN_RECIPE = "lora.yaml"
WARNING = (
    "Where it was measured it did not pay: a larger fixed rank was more accurate "
    "(docs/rank-recommendation.md). Compare with one on held-out texts."
)
"""Holds what the page says; a test compares the two."""


def ranks(
    adapter: Adapter,
    data: Annotated[str, Option(help="Table of texts; with labels, errors are shown too.")],
    against: Annotated[str | None, Option(help="A second table, to compare with.")] = None,
    output: Annotated[Path, Option(help="Folder for the report.")] = Path("bara-ranks"),
    split: Split = None,
    num_draws: Annotated[
        int, Option(min=0, max=MAX_DRAWS, help="Posterior draws; 0 for none.")
    ] = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    base_model: BaseModel = None,
    recommend: Annotated[
        bool, Option("--recommend", help="Also the ranks for a plain LoRA adapter, and a recipe.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace an earlier report.")] = False,
) -> None:
    """Report the effective rank per layer, type of module and text."""
    from rich.table import Table

    from bara.adapter.inspection import against_frozen, bayesian_adapter
    from bara.cli.terminal import console, say_next, update_card
    from bara.data.images import ImageTask
    from bara.data.question_task import QuestionTask
    from bara.evaluation.metrics import classification_metrics
    from bara.files import require_new
    from bara.finetuning.load import load_adapter, read_task
    from bara.finetuning.task_inputs import read_table
    from bara.language.tasks import LanguageTask
    from bara.machine import quieten_libraries
    from bara.posteriors.bara_config import BaraConfig
    from bara.prediction.predict import predict
    from bara.prediction.predictive import ClassificationPredictive
    from bara.ranks.effective_rank import effective_rank
    from bara.ranks.recommendation import recommend_ranks
    from bara.reports.rank_report import (
        HEADINGS,
        RankReport,
        cell,
        prediction_errors,
        write_rank_report,
    )

    quieten_libraries()
    require_new(output, force)
    task = read_task(adapter)
    tables = [read_table(data, task, split=split)]
    if against is not None:
        here = Path(against).exists()  # beside a data set of the hub, whose split it is
        tables.append(read_table(against, task, split=None if here else split))
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    bayesian_adapter(model, "ranks")
    inputs = [task.inputs(table, tokenizer, labels=False) for table in tables]
    measured = [
        effective_rank(model, part, num_draws=num_draws, seed=seed, batch_size=batch_size)
        for part in inputs
    ]
    errors = frozen = None
    if not isinstance(task, LanguageTask | QuestionTask) and (
        task.label_column in tables[0].column_names
    ):
        whole = task.inputs(tables[0], tokenizer)
        draws: dict[str, Any] = {
            "num_draws": max(1, num_draws),
            "seed": seed,
            "batch_size": batch_size,
        }
        predictive = predict(model, whole, **draws, deterministic=num_draws == 0)
        errors = prediction_errors(predictive)
        if isinstance(predictive, ClassificationPredictive):
            frozen = against_frozen(model, classification_metrics(predictive)["nll"])
    if isinstance(task, ImageTask):
        texts = [str(image) for image in tables[0]["image"]]
    elif isinstance(task, LanguageTask | QuestionTask):
        texts = [str(tokenizer.decode(row["input_ids"])) for row in inputs[0]]
    else:
        texts = [
            " | ".join(_text(row[column]) for column in task.text_columns) for row in tables[0]
        ]
    other = None if against is None else (Path(against).name, measured[1])
    report = RankReport(Path(data).name, measured[0], texts, other, errors, frozen)
    notes = [
        f"Adapter {adapter}, {len(texts)} texts of {data}, {num_draws} posterior draws, "
        f"seed {seed}."
    ]
    write_rank_report(output, report, notes)
    update_card(adapter, rank=measured[0], data=data)
    table = Table(title=f"Effective rank of {adapter} on {data}")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left")
    for row in report.modules():
        table.add_row(*map(cell, row.values()))
    terminal = console()
    terminal.print(table)
    std = measured[0].s_bar_std
    spread = "" if std is None else f" ± {std:.2f} over draws"
    lines = [f"s_bar = {measured[0].s_bar:.2f}{spread}"]
    lines += report.sentences()
    lines.append(f"{output / 'report.html'} shows the pictures.")
    for line in lines:
        terminal.print(line, soft_wrap=True)
    if recommend:
        for line in _recommendation(recommend_ranks(model, measured[0]), adapter, output):
            terminal.print(line, soft_wrap=True)
    gated = isinstance(model.active_peft_config, BaraConfig)
    uses = ("prune", "export") if gated else ("export",)
    then = [["bara", use, adapter, "--data", data, "--output", "FOLDER"] for use in uses]
    if recommend:
        then.append(["bara", "train", "--config", output / PLAIN_RECIPE])
    say_next(*then)


def _text(cell: Any) -> str:
    return " ".join(cell) if isinstance(cell, list) else str(cell)


def _recommendation(recommended: Any, adapter: Path, output: Path) -> list[str]:
    """Writes a recipe of plain LoRA with the recommended ranks; what to print of it."""
    from dataclasses import fields, replace

    from peft import LoraConfig

    from bara.cards.adapter_files import RECIPE_FILE
    from bara.files import atomic_write_text
    from bara.methods.recipe import TrainRecipe

    recipe = TrainRecipe.load(adapter / RECIPE_FILE)
    known = {field.name for field in fields(LoraConfig)}
    options = {name: value for name, value in recipe.method_options.items() if name in known}
    options |= recommended.config_options()
    plain = replace(recipe, method="lora", method_options=options, output=f"{recipe.output}-lora")
    atomic_write_text(output / PLAIN_RECIPE, plain.to_yaml())
    return [
        f"For plain LoRA: {recommended}",
        *(f"{name} = {value}" for name, value in recommended.config_options().items()),
        WARNING,
    ]
