"""`bara bayesianize`: a posterior for a LoRA adapter that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from bara.cli.options import BaseModel, BatchSize, Force, Seed


def bayesianize(
    adapter: Annotated[Path, Argument(help="Folder of a LoRA adapter, as PEFT writes it.")],
    data: Annotated[
        str, Option(help="Labelled table of a few hundred rows that were not trained on.")
    ],
    output: Annotated[Path, Option(help="Folder for the adapter with its posterior.")],
    method: Annotated[str, Option(help="tfb, or laplace for classifiers.")] = "tfb",
    options: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=VALUE",
            help="An option of the method, e.g. tolerance=0.01 or num_anchors=500 of tfb. "
            "Repeatable.",
        ),
    ] = None,
    task: Annotated[
        str | None, Option(help="classification, causal-lm or multiple-choice.")
    ] = None,
    labels: Annotated[
        str | None, Option(help="Classes in the order of the head's outputs: negative,positive.")
    ] = None,
    text_column: Annotated[str | None, Option(help="Column with the texts.")] = None,
    text_pair_column: Annotated[str | None, Option(help="Column with second texts.")] = None,
    label_column: Annotated[str | None, Option(help="Column with the classes.")] = None,
    max_length: Annotated[int | None, Option(min=2, help="Longest input in tokens.")] = None,
    dtype: Annotated[str | None, Option(help="Of the base model, e.g. bfloat16.")] = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Give a LoRA adapter that was trained elsewhere a posterior, without training."""
    from bara.cli.terminal import require_output, say_next
    from bara.cli.train import parse_options
    from bara.finetuning.bayesianize import bayesianize as fit
    from bara.machine import quieten_libraries

    quieten_libraries()
    require_output(output, adapter, force)
    model_options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    made = fit(
        adapter,
        data,
        output,
        method=method,
        method_options=parse_options(options or []),
        task=task,
        labels=None if labels is None else [name.strip() for name in labels.split(",")],
        text_column=text_column,
        text_pair_column=text_pair_column,
        label_column=label_column,
        max_length=max_length,
        base_model=base_model,
        model_options=model_options,
        batch_size=batch_size,
        seed=seed,
        overwrite=force,
    )
    found = (
        f"noise of size {made.noise:.3g}"
        if made.noise is not None
        else f"a prior of precision {made.prior_precision:.3g}"
    )
    print(f"{method} on {made.num_texts} rows: {found}.")
    print(f"Negative log-likelihood of these rows: {made.mean_nll:.4f} as the adapter was,")
    print(f"{made.mixture_nll:.4f} as the mixture of 10 draws. The posterior is in {output}.")
    say_next(["bara", "evaluate", output, "--data", "LABELLED"])
