"""`bara quickstart`: what the library does, shown on real data in minutes, offline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from bara.cli.terminal import console, say_next
from bara.schema import MAX_DRAWS, SEEDS

MINUTES = 5.0
"""A run that is asked for nothing takes no longer, after the installation."""
COLUMNS = {
    "accuracy": ("acc", "{:.3f}"),
    "nll": ("NLL", "{:.3f}"),
    "ece": ("ECE", "{:.3f}"),
    "brier": ("Brier", "{:.3f}"),
    "ood_auroc": ("OOD AUROC", "{:.3f}"),
    "s_bar": ("s_bar", "{:.2f}"),
    "r": ("r", "{}"),
    "trainable_parameters": ("trained", "{:,}"),
    "seconds": ("s", "{:.0f}"),
}


def quickstart(
    output: Annotated[Path, Option(help="Folder for the report and the adapters.")] = Path(
        "bara-quickstart"
    ),
    tiny: Annotated[
        bool, Option("--tiny", help="Under a minute; too small to judge methods by.")
    ] = False,
    num_train: Annotated[int | None, Option(min=30, help="Training texts; 300.")] = None,
    num_test: Annotated[int | None, Option(min=30, help="Test texts; 600.")] = None,
    num_ood: Annotated[int | None, Option(min=10, help="Out-of-distribution texts; 300.")] = None,
    epochs: Annotated[
        float | None, Option(min=0.1, max=1e6, help="Passes over the training texts; 20.")
    ] = None,
    num_draws: Annotated[
        int | None, Option(min=1, max=MAX_DRAWS, help="Posterior draws in prediction; 10.")
    ] = None,
    minutes: Annotated[
        float | None,
        Option(min=0.1, max=1e6, help="A slow machine does less, to take so long; 5."),
    ] = None,
    seed: Annotated[
        int, Option(min=0, max=SEEDS - 1, help="Seed of the data, the training and the draws.")
    ] = 0,
) -> None:
    """Compare a probe, LoRA and BaRA on tweets with 300 training texts; writes a report."""
    from dataclasses import replace

    from bara.data.examples import minilm_path
    from bara.machine import quieten_libraries
    from bara.quickstart import SHORTENED, TINY, TOO_SMALL, Size, run_quickstart

    quieten_libraries()
    terminal = console()
    options = {
        "num_train": num_train,
        "num_test": num_test,
        "num_ood": num_ood,
        "epochs": epochs,
        "num_draws": num_draws,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    size = replace(TINY if tiny else Size(), **given)
    terminal.print(
        f"Fine-tuning MiniLM on {size.num_train} tweets, with a linear probe, with LoRA and with "
        f"BaRA, and testing them on {size.num_test} tweets and {size.num_ood} news texts."
    )

    if minutes is None and not given:
        minutes = MINUTES

    def announce(seconds: float, fitted: Size) -> None:
        terminal.print(f"That takes about {duration(seconds)} here, by the first steps.")
        if fitted != size:
            terminal.print(
                f"So long with {fitted.epochs:g} of {size.epochs:g} epochs and {fitted.num_test} "
                f"of {size.num_test} tweets to test on: --minutes sets the time.",
                style="yellow",
            )

    results = run_quickstart(output, size, seed=seed, minutes=minutes, announce=announce)
    _print_table(terminal, results["rows"])
    if results["shortened"]:
        terminal.print(SHORTENED, style="yellow")
    elif not size.judges:
        terminal.print(TOO_SMALL, style="yellow")
    _print_examples(terminal, results["examples"])
    terminal.print(f"{output / 'report.html'} shows the pictures.", soft_wrap=True)
    say_next(
        ["bara", "predict", output / "bara", "--data", "TABLE.csv"],
        [
            "bara",
            "train",
            "--model",
            minilm_path(),
            "--data",
            "TABLE.csv",
            "--output",
            "my-adapter",
        ],
        ["bara", "evaluate", "my-adapter", "--data", "TEST.csv"],
    )


def duration(seconds: float) -> str:
    """Rounded up, since a wait that ends early is a good one: `40 seconds`, `7 minutes`."""
    if seconds <= 90:
        return f"{10 * math.ceil(seconds / 10)} seconds"
    return f"{math.ceil(seconds / 60)} minutes"


def _print_table(console: Any, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        padding=(0, 0, 0, 1),
        caption="acc: accuracy; trained: trainable parameters; s: seconds of training",
    )
    table.add_column("")
    for heading, _ in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["method"], *(form.format(row[key]) for key, (_, form) in COLUMNS.items()))
    console.print(table)


def _print_examples(console: Any, examples: dict[str, list[dict[str, Any]]]) -> None:
    from rich.text import Text

    for heading, texts in examples.items():
        console.print(heading, style="bold")
        for example in texts:
            verdict = f"  {example['prediction']} {example['confidence']:.0%}"
            if example["label"] != example["prediction"]:
                verdict += f" (it is {example['label']})"
            line = Text(f"{verdict}: {example['text']}")
            line.truncate(console.width, overflow="ellipsis")
            console.print(line)
