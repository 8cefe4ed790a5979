"""`bara prune`: a smaller adapter, without the factors that the task does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from bara.cli.options import BaseModel, BatchSize, Force, HeldOut, Seed
from bara.schema import MAX_DRAWS, json_text


def prune(
    adapter: Annotated[Path, Argument(help="Folder that `bara train` wrote, of method bara.")],
    data: Annotated[str, Option(help="Table of texts to fit the gates on; classes are not used.")],
    output: Annotated[Path, Option(help="Folder for the smaller adapter.")],
    held_out: HeldOut = None,
    threshold: Annotated[
        float, Option(help="Factors whose inclusion is below it go; in [0, 1].")
    ] = 0.5,
    tolerance: Annotated[
        float, Option(help="Largest mean change of the probabilities (or of the prediction).")
    ] = 0.05,
    num_draws: Annotated[
        int, Option(min=1, max=MAX_DRAWS, help="Posterior draws to compare.")
    ] = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Remove factors whose posterior inclusion is below a threshold."""
    from bara.cards.adapter_files import RECIPE_FILE
    from bara.cli.terminal import calibration_inputs, require_output, say_next
    from bara.finetuning.load import load_adapter
    from bara.finetuning.save import save_adapter
    from bara.machine import quieten_libraries
    from bara.methods.recipe import TrainRecipe
    from bara.ranks.pruning import check_threshold, check_tolerance, require_removal
    from bara.ranks.pruning import prune as prune_model

    quieten_libraries()
    check_threshold(threshold)
    check_tolerance(tolerance)
    require_output(output, adapter, force)
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    require_removal(model, threshold)
    fit, measure = calibration_inputs(data, held_out, tokenizer, task)
    pruning = prune_model(
        model,
        fit,
        threshold=threshold,
        tolerance=tolerance,
        held_out=measure,
        num_draws=num_draws,
        seed=seed,
        batch_size=batch_size,
    )
    recipe = TrainRecipe.load(adapter / RECIPE_FILE)
    numbers = json_text(pruning.to_dict(), indent=2) + "\n"

    def beside(folder: Path) -> None:
        (folder / "pruning.json").write_text(numbers, "utf-8")

    save_adapter(output, pruning.model, tokenizer, task, recipe, beside)
    print(pruning)
    print(f"The pruned adapter is in {output}.")
    say_next(["bara", "evaluate", output, "--data", "LABELLED"])
