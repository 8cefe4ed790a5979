"""`bara export`: an adapter as files that need no `bara`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from bara.cli.options import Adapter, BaseModel, BatchSize, Force, HeldOut
from bara.schema import MAX_DRAWS, SEEDS

if TYPE_CHECKING:
    from bara.methods.recipe import TrainRecipe


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
        int | None,
        Option("--num-draws", "-n", min=1, max=MAX_DRAWS, help="Adapters of draws; 10 by default."),
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, max=SEEDS - 1, help="Seed of the draws; 0 by default.")
    ] = None,
    patterns: Annotated[
        bool, Option("--patterns", help="Keep each layer's rank and scaling, as PEFT reads them.")
    ] = False,
    server: Annotated[
        str | None, Option(help="vllm or sglang: refuse what it could not load.")
    ] = None,
    load_into: Annotated[
        str | None,
        Option(
            metavar="URL", help="Load the draws into the server there, vLLM or bara, up to /v1."
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, Option(help="File with the key of that server.", dir_okay=False, exists=True)
    ] = None,
    batch_size: BatchSize = 64,
    base_model: BaseModel = None,
    force: Force = False,
) -> None:
    """Write plain LoRA adapters, or a merged model, that load without `bara`."""
    from bara.cards.adapter_files import RECIPE_FILE, TASK_FILE
    from bara.cli.terminal import calibration_inputs, require_output, say_next
    from bara.data.text_task import TextTask
    from bara.errors import BaraError
    from bara.export.export_lora import check_mode, export_lora
    from bara.export.servers import check_server
    from bara.finetuning.load import load_adapter
    from bara.finetuning.task_inputs import read_table
    from bara.language.tasks import LanguageTask
    from bara.machine import quieten_libraries
    from bara.models.sentence import SentenceClassifier, save_max_length
    from bara.prediction.outputs import base_of
    from bara.prediction.temperature import save_temperature

    quieten_libraries()
    chosen = check_mode(mode)
    if server is not None:
        check_server(server)
    require_output(output, adapter, force)
    _refuse(
        chosen,
        {"--load-into": load_into, "--num-draws": num_draws, "--seed": seed},
        {"--patterns": patterns or None, "--server": server},
    )
    if api_key_file is not None and load_into is None:
        raise BaraError("--api-key-file is for the server of --load-into: give that too")
    if held_out is not None and data is None:
        raise BaraError("--held-out measures an export: give --data too")
    model, tokenizer, task = load_adapter(adapter, base_model=base_model)
    fit, measure = (None, None)
    if data is not None and isinstance(task, LanguageTask):  # no classes to measure a change of
        if held_out is not None:
            raise BaraError("--held-out is not for language models: leave it out")
        fit = task.inputs(read_table(data, task), tokenizer)
    elif data is not None:
        fit, measure = calibration_inputs(data, held_out, tokenizer, task)
    recipe = _recipe(adapter)

    def beside(folder: Path) -> None:
        tokenizer.save_pretrained(str(folder))
        task.save(folder / TASK_FILE)
        if isinstance(task, LanguageTask):
            save_temperature(model, folder)
        if chosen != "merged":  # a classifier's temperature, if it had one, is in the head now
            (folder / RECIPE_FILE).write_text(recipe.to_yaml(), "utf-8")
        elif isinstance(task, TextTask) and isinstance(base_of(model), SentenceClassifier):
            save_max_length(folder, min(task.max_length, tokenizer.model_max_length))

    exported = export_lora(
        model,
        output,
        mode=chosen,
        data=fit,
        held_out=measure,
        num_draws=10 if num_draws is None else num_draws,
        seed=seed or 0,
        patterns=patterns,
        server="vllm" if load_into is not None and server is None else server,
        overwrite=force,
        beside=beside,
        batch_size=batch_size,
    )
    print(f"{output}: {exported.bytes:,} bytes of tensors, mode {chosen}.")
    if exported.difference is not None:
        inputs = exported.difference.num_inputs
        print(f"Distance to the original on {inputs} held-out texts: {exported.difference}")
    for why in exported.refusals.values():
        if why:
            print(f"Not for this server: {why}.")
    if load_into is not None:
        _load(output, load_into, api_key_file)
    print(f"{output / 'README.md'} has the lines that load it.")
    # a merged model is for others to load: it has no recipe
    readable = {"mean": output, "draws": output / "draw-0", "merged": adapter}[chosen]
    say_next(["bara", "evaluate", readable, "--data", "LABELLED"])


def _refuse(mode: str, of_draws: dict[str, object], of_adapters: dict[str, object]) -> None:
    """Refuses options that another mode has."""
    from bara.errors import BaraError

    for option, value in of_draws.items():
        if value is not None and mode != "draws":
            raise BaraError(f"{option} is for --mode draws, and {mode} has none: leave it out")
    for option, value in of_adapters.items():
        if value is not None and mode == "merged":
            raise BaraError(f"{option} is for adapters, and merged is a whole model: leave it out")


def _recipe(adapter: Path) -> TrainRecipe:
    """The recipe of what is written: noise and temperature are not in its files any more."""
    from dataclasses import replace

    from bara.cards.adapter_files import RECIPE_FILE
    from bara.methods.recipe import TrainRecipe
    from bara.methods.table import TEMPERED, parse_method

    recipe = TrainRecipe.load(adapter / RECIPE_FILE)
    method, _ = parse_method(recipe.method)
    if method.trainer.weight_noise:
        recipe = replace(recipe, method="lora", method_options={})
    return replace(recipe, method=recipe.method.lower().removesuffix(TEMPERED))


def _load(folder: Path, url: str, api_key_file: Path | None) -> None:
    """Loads the draws in a folder into a server."""
    from bara.errors import BaraError
    from bara.export.client import Ensemble, EnsembleError

    key = None if api_key_file is None else api_key_file.read_text("utf-8").strip()
    ensemble = Ensemble.from_folder(folder, url=url, api_key=key)
    try:
        ensemble.load(folder)
    except EnsembleError as error:
        raise BaraError(f"the export is in {folder}, but not loaded: {error}") from error
    print(f"Loaded {len(ensemble.adapters)} draws into {url}.")
