"""Adapters that run wherever plain LoRA runs: without `bara`, merged, or as an ensemble."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from bara.adapter.inspection import (
    bayesian_adapter,
    copy_sharing_base,
    num_bytes,
    one_adapter,
    require_untied,
)
from bara.cards.adapter_files import CALIBRATIONS, LOADED_FILES, WEIGHTS_FILE
from bara.draws.draws import check_draws, draw_source
from bara.errors import BaraError
from bara.evaluation.difference import Difference, difference
from bara.export import client
from bara.export.card import write_export_card, write_merged_card
from bara.export.plain_lora import PlainLora
from bara.export.servers import VERSIONS, Server, check_server, refusal
from bara.files import atomic_directory, require_new, require_space
from bara.language.prompts import generates, is_encoder_decoder
from bara.language.tasks import GENERATING_TASKS
from bara.methods.weight_draws import WeightDraws
from bara.models.sentence import SentenceClassifier, save_sentence_transformer
from bara.prediction.batches import Collate
from bara.prediction.mixture import mixture
from bara.prediction.predict import predict
from bara.prediction.temperature import fold_temperature, get_temperature, output_layer
from bara.ranks.effective_rank import calibrate_gates

Mode = Literal["mean", "draws", "merged"]
MANIFEST_FILE = "manifest.json"
CLIENT_FILE = "client.py"
TASKS = {"TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering"}
"""Names of PEFT's tasks that the model's configuration does not tell apart."""


@dataclass(frozen=True)
class Export:
    """What `export_lora` wrote.

    Attributes:
        folder: where.
        mode: `mean`, `draws` or `merged`.
        bytes: size of the tensors.
        difference: on the held-out inputs, between the export and the original: the posterior mean
            for `mean` and `merged`, the mixture of the same number of draws for `draws`; None
            without held-out inputs.
        refusals: by server, why it cannot load the adapters, or None if it can; empty for
            `merged`.
    """

    folder: Path
    mode: Mode
    bytes: int
    difference: Difference | None
    refusals: dict[Server, str | None]


def export_lora(
    model: PeftModel,
    folder: str | Path,
    *,
    mode: Mode = "mean",
    data: Any = None,
    held_out: Any = None,
    num_draws: int = 10,
    seed: int = 0,
    patterns: bool = False,
    server: str | None = None,
    overwrite: bool = False,
    beside: Callable[[Path], object] | None = None,
    batch_size: int = 64,
    collate_fn: Collate | None = None,
    progress: bool | None = None,
) -> Export:
    """Writes a Bayesian adapter, or one with noise on its weights, in a form that needs no `bara`.

    - `mean`: a plain LoRA adapter for `peft`, the posterior mean. Exact for BaLoRA and for BaRA
      without input-dependent gates; otherwise the gates are at their average over `data`.
    - `draws`: `num_draws` plain LoRA adapters `draw-0`, `draw-1`, ..., draws of the global
      posterior, with a manifest; for causal language models also `client.py`, which averages a
      server's answers. What depends
      on the input (BaRA's local gates, BaLoRA's noise level) is at its average
      over `data`. Draw d has the numbers of draw d of `bara.sampling(model, seed=seed)`, but for
      the noise on A (BaRA's and BaLoRA's), which is sampled for the whole matrix.
    - `merged`: the mean merged into the base model, a plain transformers folder. A
      `SentenceClassifier` becomes a sentence-transformers folder whose embedding is the logits.
      Takes the memory of a second copy of the model.

    Trained heads (`modules_to_save`) are part of every export. A temperature is folded into them;
    that of a language model, which divides the scores of choices, is in the draws' manifest.

    Args:
        model: a PEFT model with one active Bayesian adapter. With `data` its calibration is
            that of `bara.calibrate_gates(model, data)` afterwards; nothing else changes.
        folder: where to write, whole or not at all.
        data: calibration inputs, as in `bara.calibrate_gates`; not needed where nothing depends
            on the input, or after `calibrate_gates`.
        held_out: inputs on which to measure the difference to the original, read several times
            in the same order.
        num_draws, seed: of `draws`.
        patterns: keep each layer's rank and scaling (`rank_pattern`, `alpha_pattern`). Without, all
            layers get one `r` and one `lora_alpha`: ranks are padded with zeros, and what the
            scaling differs by is in B. Some servers read these two alone.
        server: `vllm` or `sglang`: refuse what it could not load.
        overwrite: replace files in a folder that is not empty, and the draws of an earlier export.
        beside: writes further files, such as `tokenizer.save_pretrained`, into a folder; called
            with that of each adapter, or of the merged model, before all take their place at once.
        batch_size, collate_fn, progress: as in `bara.predict`.

    Raises:
        BaraError: an unknown mode, another method's adapter, draws of a linearised posterior,
            missing or empty calibration data, a folder that is not empty, too little disk space, a
            model that cannot be merged, a temperature that cannot be folded into the head, or what
            the server cannot load.
    """
    check_mode(mode)
    num_draws = check_draws(num_draws)
    asked = None if server is None else check_server(server)
    weight_noise = isinstance(draw_source(model), WeightDraws)
    adapter = (one_adapter if weight_noise else bayesian_adapter)(model, "export")
    require_new(folder, overwrite)
    tempered = get_temperature(model) != 1 and _task(model)[0] not in GENERATING_TASKS
    if tempered:
        output_layer(model)  # refuses before anything slow
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "collate_fn": collate_fn,
        "progress": progress,
    }
    if data is not None and not weight_noise:  # whose draws do not depend on the input
        calibrate_gates(model, data, **options)
    original: Any = model.peft_config[adapter]
    shipped = model
    if tempered:
        shipped = copy_sharing_base(model)
        fold_temperature(shipped)

    def measured(models: Iterator[PeftModel], **expected: Any) -> Difference | None:
        if held_out is None:
            return None
        parts = [predict(m, held_out, deterministic=True, **options) for m in models]
        return difference(predict(model, held_out, **expected, **options), mixture(parts))

    if mode == "merged":
        merged, size = _merged(shipped, folder)
        distance = measured(iter([merged]), deterministic=True)
        with atomic_directory(folder, drop=_outdated(folder)) as temporary:
            class_name = _save_merged(merged, temporary)
            write_merged_card(temporary, original, class_name, distance)
            if beside is not None:
                beside(temporary)
        return Export(Path(folder), mode, size, distance, {})

    drawn = mode == "draws"
    plain = PlainLora(shipped, draws=(seed, num_draws) if drawn else None, patterns=patterns)
    first = plain.tensors(0)
    reasons = {known: refusal(known, plain.config, first) for known in VERSIONS}
    if asked and reasons[asked]:
        raise BaraError(f"{reasons[asked]}: nothing was exported")
    size = plain.count * num_bytes(first)
    require_space(folder, size, f"{plain.count} adapters" if drawn else "The adapter")
    distance = measured(
        plain.models(),
        **({"num_draws": num_draws, "seed": seed} if drawn else {"deterministic": True}),
    )
    with atomic_directory(folder, drop=_outdated(folder)) as temporary:
        for number in range(plain.count):
            target = temporary / f"draw-{number}" if drawn else temporary
            target.mkdir(exist_ok=True)
            tensors = plain.tensors(number)
            save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
            plain.config.save_pretrained(str(target))
            if beside is not None:
                beside(target)
        if drawn:
            manifest = _manifest(shipped, plain, distance, reasons)
            (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
            if manifest["task"] in ("causal-lm", "classification"):  # what a server answers
                source = Path(client.__file__).read_text("utf-8")
                (temporary / CLIENT_FILE).write_text(source, "utf-8")
        write_export_card(temporary, original, mode, num_draws, distance)
    return Export(Path(folder), mode, size, distance, reasons)


def check_mode(mode: str) -> Mode:
    """The mode, if it is one.

    Raises:
        BaraError: it is not.
    """
    if mode not in get_args(Mode):
        raise BaraError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r} (--mode)")
    return cast(Mode, mode)


def _manifest(
    model: PeftModel,
    plain: PlainLora,
    distance: Difference | None,
    refusals: dict[Server, str | None],
) -> dict[str, Any]:
    """What loading the draws takes, and how far their mixture is from the original's."""
    task, names = _task(model)
    return {
        "base_model": plain.config.base_model_name_or_path,
        "task": task,
        "label_names": names,
        "num_draws": plain.count,
        "seed": plain.seed,
        "rank": plain.rank,
        "temperature": get_temperature(model),  # 1 where it is folded into the head
        "difference": None if distance is None else distance.to_dict(),
        "refused_by": {VERSIONS[server]: why for server, why in refusals.items() if why},
        "adapters": [f"draw-{number}" for number in range(plain.count)],
    }


def _task(model: PeftModel) -> tuple[str, list[str] | None]:
    """The task, and the names of its classes or labels."""
    if generates(model):
        return "seq2seq" if is_encoder_decoder(model) else "causal-lm", None
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    kind = TASKS.get(getattr(model.active_peft_config, "task_type", None) or "")
    if problem == "regression" or kind == "question-answering":
        return kind or "regression", None
    names = getattr(config, "id2label", None)
    several = "multi-label" if problem == "multi_label_classification" else "classification"
    return kind or several, names and [names[number] for number in sorted(names)]


def _outdated(folder: str | Path) -> list[str]:
    """Names that an earlier export left and that would not belong to the new files."""
    draws = [p.name for p in Path(folder).glob("draw-*") if re.fullmatch(r"draw-\d+", p.name)]
    left = [*CALIBRATIONS, *LOADED_FILES, *draws]
    return left + ([MANIFEST_FILE, CLIENT_FILE] if draws else [])


def _merged(model: PeftModel, folder: str | Path) -> tuple[Any, int]:
    """A merged copy and its size in bytes."""
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise BaraError(
            f"merged exports are for transformers models, not {type(base).__name__}: merge with "
            "merge_and_unload() and save it your own way"
        )
    require_untied(base, model.active_adapters)
    size = num_bytes(base.state_dict())
    require_space(folder, size, "The merged model")
    return copy.deepcopy(model).merge_and_unload(safe_merge=True), size


def _save_merged(merged: Any, folder: Path) -> str:
    """Saves the model; returns the name of the class that loads it."""
    if isinstance(merged, SentenceClassifier):
        save_sentence_transformer(merged, folder)
        return "SentenceTransformer"
    merged.save_pretrained(str(folder))
    return type(merged).__name__
