"""What pruning and export change, on the quickstart's tweets: the numbers of docs.

    python benchmarks/prune_export.py --work prune-export

Trains an adapter per setting (in --work, where a finished one is kept), prunes it at several
thresholds and exports it, on the first 100 test tweets; the change is measured on the next 100.
Each finished cell is written to benchmarks/results/prune_export.json at once and not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bara
from bara.data import tokenise
from bara.examples_data import load_sentiment, minilm_path
from bara.files import atomic_write_text
from bara.finetune import finetune
from bara.loading import load_adapter
from bara.quickstart import MAX_LENGTH, versions
from bara.recipe import TrainRecipe

RESULTS = Path(__file__).parent / "results" / "prune_export.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "sparse": {"logit_scale": 100.0, "global_prior": 0.05, "kl_weight": 3.0},
}
THRESHOLDS = (0.05, 0.5, 0.95)
TEXTS = 100
DRAWS = 5


def cell(results: dict[str, Any], name: str, make: Callable[[], Any]) -> None:
    """Makes a cell of the results unless it is there, and writes the file."""
    if name not in results:
        results[name] = make()
        print(name, json.dumps(results[name])[:300], flush=True)
        atomic_write_text(RESULTS, json.dumps(results, indent=2) + "\n")


def prune_cell(model: Any, fit: Any, held_out: Any, threshold: float) -> dict[str, Any]:
    """The summary of one pruning, or why there is none."""
    try:
        pruning = bara.prune(
            model, fit, threshold=threshold, held_out=held_out, num_draws=DRAWS, progress=False
        )
    except bara.BaraError as error:
        return {"refused": str(error)}
    result = pruning.to_dict()
    inclusion = torch.cat(list(pruning.inclusion.values()))
    result["inclusion"] = {"min": inclusion.min().item(), "mean": inclusion.mean().item()}
    result["factors"] = len(inclusion)
    result["emptied_layers"] = sum(not kept for kept in pruning.kept.values())
    del result["kept"]
    return result


def export_cell(model: Any, fit: Any, held_out: Any, mode: Any) -> dict[str, Any]:
    """Size of one export and its distance to the original."""
    with tempfile.TemporaryDirectory() as folder:
        export = bara.export_lora(
            model,
            Path(folder) / "export",
            mode=mode,
            data=fit,
            held_out=held_out,
            num_draws=DRAWS,
            progress=False,
        )
    assert export.difference is not None
    return {"bytes": export.bytes, "difference": export.difference.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("prune-export"))
    work = parser.parse_args().work
    data = load_sentiment(300, 2 * TEXTS, num_validation=0, seed=0)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = versions()
    for name, options in SETTINGS.items():
        folder = work / name
        if not (folder / "adapter_config.json").exists():
            recipe = TrainRecipe(
                model=str(minilm_path()),
                output=str(folder),
                method_options=options,
                training={"save_strategy": "no", "use_cpu": True},
                max_length=MAX_LENGTH,
            )
            finetune(recipe, data.train)
        model, tokenizer, task = load_adapter(folder, device="cpu")
        inputs = tokenise(data.test, tokenizer, task, labels=False)
        fit, held_out = inputs.select(range(TEXTS)), inputs.select(range(TEXTS, 2 * TEXTS))
        for mode in ("mean", "draws"):
            cell(
                results,
                f"{name}/export-{mode}",
                lambda: export_cell(model, fit, held_out, mode),  # noqa: B023
            )
        for threshold in THRESHOLDS:
            cell(
                results,
                f"{name}/prune-{threshold:g}",
                lambda: prune_cell(model, fit, held_out, threshold),  # noqa: B023
            )


if __name__ == "__main__":
    main()
