"""`bara export`: an adapter as files that need no `bara`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from bara.cli.options import Adapter, BaseModel, BatchSize, Force, HeldOut, Seed
from bara.schema import MAX_DRAWS


def export(
    adapter: Adapter,
    output: Annotated[Path, Option(help="Folder for the export.")],
    mode: Annotated[
        str, Option(help="mean: one LoRA adapter; draws: an ensemble; merged: a whole model.")
    ] = "mean",
    data: Annotated[
        str | None, Option(help="Table of texts to average what depends on the input over.")
    ] = None,
    held_out: HeldOut = None,
    num_draws: Annotated[
        int, Option("--num-draws", "-n", min=1, max=MAX_DRAWS, help="Adapters of draws.")
    ] = 10,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Write plain LoRA adapters, or a merged model, that load without `bara`."""
    from dataclasses import replace

    from bara.cards.adapter_files import RECIPE_FILE, TASK_FILE
    from bara.cli.terminal import calibration_inputs, require_output
    from bara.errors import BaraError
    from bara.export.export_lora import check_mode, export_lora
    from bara.finetuning.load import load_adapter
    from bara.language.tasks import LanguageTask
    from bara.machine import quieten_libraries
    from bara.methods.recipe import TrainRecipe
    from bara.methods.table import TEMPERED
    from bara.prediction.temperature import save_temperature

    quieten_libraries()
    chosen = check_mode(mode)
    require_output(output, adapter, force)
    if held_out is not None and data is None:
        raise BaraError("--held-out measures an export: give --data too")
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    fit, measure = (None, None)
    if data is not None:
        fit, measure = calibration_inputs(data, held_out, tokenizer, task)
    recipe = TrainRecipe.load(adapter / RECIPE_FILE)
    recipe = replace(recipe, method=recipe.method.lower().removesuffix(TEMPERED))

    def beside(folder: Path) -> None:
        tokenizer.save_pretrained(str(folder))
        task.save(folder / TASK_FILE)
        if isinstance(task, LanguageTask):
            save_temperature(model, folder)
        if chosen != "merged":  # a classifier's temperature, if it had one, is in the head now
            (folder / RECIPE_FILE).write_text(recipe.to_yaml(), "utf-8")

    exported = export_lora(
        model,
        output,
        mode=chosen,
        data=fit,
        held_out=measure,
        num_draws=num_draws,
        seed=seed,
        overwrite=force,
        beside=beside,
        batch_size=batch_size,
    )
    print(f"{output}: {exported.bytes:,} bytes of tensors, mode {chosen}.")
    if exported.difference is not None:
        inputs = exported.difference.num_inputs
        print(f"Distance to the original on {inputs} held-out texts: {exported.difference}")
