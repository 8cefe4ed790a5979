"""`bara evaluate`: how good and how calibrated an adapter is on a labelled table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def evaluate(
    adapter: Annotated[Path, Argument(help="Folder that `bara train` wrote.")],
    data: Annotated[str, Option(help="Labelled table: a file or a hub data set.")],
    ood: Annotated[str | None, Option(help="Table of texts out of distribution.")] = None,
    split: Annotated[str | None, Option(help="Split of a hub data set.")] = None,
    num_draws: Annotated[int, Option(min=1, help="Posterior draws.")] = 10,
    seed: Annotated[int, Option(help="Seed of the draws.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Texts times draws in one pass.")] = 256,
    base_model: Annotated[str | None, Option(help="Where the base model is now.")] = None,
    json_file: Annotated[
        Path | None, Option("--json", metavar="FILE", help="Write the numbers here too.")
    ] = None,
) -> None:
    """Print accuracy, likelihood, calibration and out-of-distribution detection."""
    from rich.console import Console
    from rich.table import Table

    from bara.cli.terminal import quieten_libraries, update_card
    from bara.data import load_table, tokenise
    from bara.files import atomic_write_text
    from bara.loading import load_adapter
    from bara.prediction import evaluate as evaluate_inputs

    quieten_libraries()
    table = load_table(data, split=split)
    ood_table = None if ood is None else load_table(ood)
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    inputs = tokenise(table, tokenizer, task)
    ood_inputs = None if ood_table is None else tokenise(ood_table, tokenizer, task, labels=False)
    evaluation = evaluate_inputs(
        model,
        inputs,
        ood=ood_inputs,
        num_draws=num_draws,
        seed=seed,
        batch_size=batch_size,
    )
    view = Table(title=f"{adapter} on {data}", caption=f"{len(inputs)} texts, {num_draws} draws")
    view.add_column("metric")
    view.add_column("value", justify="right")
    for name, value in evaluation.metrics.items():
        view.add_row(name, f"{value:.4f}")
    Console().print(view)
    update_card(adapter, evaluation=evaluation, data=data)
    if json_file is not None:
        content = {
            "adapter": str(adapter),
            "data": data,
            "ood": ood,
            "num_texts": len(inputs),
            "num_draws": num_draws,
            "seed": seed,
            "metrics": evaluation.to_dict(),
        }
        atomic_write_text(json_file, json.dumps(content, indent=2) + "\n")
