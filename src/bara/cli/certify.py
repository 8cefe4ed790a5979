"""`bara certify`: a bound on a certified adapter's error rate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from bara.cli.options import BaseModel, BatchSize, Seed, Split, probability
from bara.cli.terminal import console, say_next
from bara.schema import MAX_DRAWS, json_text

ROWS = {
    "bound": "bound on the error rate",
    "gibbs_risk": "error rate on these texts",
    "gibbs_risk_bound": "  with the error of its estimate",
    "majority_error": "error rate of the most frequent class",
    "kl": "KL(posterior || prior), nats",
    "n": "n, texts",
    "delta": "delta",
    "num_samples": "draws",
    "num_priors": "priors",
    "effective_rank": "effective rank",
    "max_rank": "maximum rank",
    "complexity_effective": "complexity term of the effective rank",
    "complexity_max": "complexity term of the maximum rank",
}
ASSUMPTIONS = (
    "The bound is on the Gibbs classifier, which draws an adapter for every text; the majority "
    "vote over draws errs at most twice as often. It holds if the texts are independent and like "
    "those to come, the base model has not seen them, and no option was chosen by looking at them "
    "(the priors' standard deviations apart). The complexity terms are no part of it. See "
    "docs/certificates.md."
)


def certify(
    adapter: Annotated[Path, Argument(help="Folder that `bara train --method certified` wrote.")],
    data: Annotated[str, Option(help="The table that it was trained on.")],
    split: Split = None,
    delta: Annotated[
        float, Option(callback=probability, help="Probability that the bound fails.")
    ] = 0.05,
    num_draws: Annotated[
        int, Option(min=1, max=MAX_DRAWS, help="Posterior draws for each text.")
    ] = 50,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    base_model: BaseModel = None,
    output: Annotated[Path | None, Option(help="Write the certificate here too (JSON).")] = None,
    force: Annotated[bool, Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Print a bound on the error rate that holds with probability 1 - delta."""
    from rich.table import Table

    from bara.certificates.certificate import certify as certify_inputs
    from bara.errors import BaraError
    from bara.files import atomic_write_text
    from bara.finetuning.certified_prior import certification_rows
    from bara.finetuning.load import load_adapter, read_config, read_task
    from bara.finetuning.task_inputs import read_table, text_task
    from bara.machine import quieten_libraries

    quieten_libraries()
    if output is not None and output.exists() and not force:
        raise BaraError(f"{output} exists; give another --output, or --force to replace it")
    read_config(adapter)
    task = text_task(read_task(adapter), "certify")
    rows = certification_rows(read_table(data, task, split=split), task, adapter)
    model, tokenizer, _ = load_adapter(adapter, base_model=base_model)
    certificate = certify_inputs(
        model,
        task.inputs(rows, tokenizer),
        delta=delta,
        num_draws=num_draws,
        seed=seed,
        batch_size=batch_size,
    )
    values = certificate.to_dict()
    view = Table(title=f"{adapter} on {data}", caption=f"{certificate.verdict} {ASSUMPTIONS}")
    view.add_column("certificate")
    view.add_column("value", justify="right")
    for name, label in ROWS.items():
        value = values[name]
        view.add_row(label, f"{value:.4f}" if isinstance(value, float) else str(value))
    console().print(view)
    if output is not None:
        content = {"adapter": str(adapter), "data": data, "seed": seed, **values}
        content["assumptions"] = ASSUMPTIONS
        atomic_write_text(output, json_text(content, indent=2) + "\n")
    say_next(["bara", "predict", adapter, "--data", "TABLE"])
