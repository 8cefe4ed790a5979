"""The cards of exports."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig

from bara.cards.card_file import HERE, PLAIN_CARD, write_sections
from bara.cards.loading_code import SavedAdapter, loading_code
from bara.evaluation.difference import Difference
from bara.posteriors.config import BayesianConfig

MERGED = """from transformers import {class_name}

model = {class_name}.from_pretrained("{folder}").eval()
"""
MERGED_SENTENCE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
logits = model.encode(["a text"], convert_to_tensor=True)  # the embedding is the logits
"""


def write_merged_card(
    folder: Path, config: PeftConfig, class_name: str, difference: Difference | None
) -> None:
    """The card of a model into which the posterior mean of an adapter was merged.

    Args:
        folder: of the model.
        config: the adapter's.
        class_name: the class of transformers that loads it, or `SentenceTransformer`.
        difference: to the adapter's own predictions.
    """
    name = _title(config)
    code = MERGED_SENTENCE if class_name == "SentenceTransformer" else MERGED
    section = (
        f"# {config.base_model_name_or_path} with {name} merged\n\nThe base model with the "
        f"posterior mean of a {name} adapter merged into its weights. Made by `bara export`; its "
        "uncertainty is not part of it. To load it:\n\n"
        f"```python\n{code.format(class_name=class_name, folder=HERE)}```\n\n"
        f"{_measured(difference)}"
    )
    sections = {"method": section, "rank": "", "metrics": ""}
    write_sections(folder, sections, tags=("bara",), empty=PLAIN_CARD)


def write_export_card(
    folder: Path, config: PeftConfig, mode: str, num_draws: int, difference: Difference | None
) -> None:
    """The card of a plain LoRA adapter, or of several draws, that was made of another adapter."""
    name = _title(config)
    if mode == "draws":
        what = (
            f"{num_draws} plain LoRA adapters, `draw-0` and so on: draws of the posterior of a "
            f"{name} adapter. Average the probabilities they give; `manifest.json` has "
            "their names. `client.py`, if it is here, averages those of a server."
        )
        first = "draw-0"
    else:
        what = f"A plain LoRA adapter: the posterior mean of a {name} adapter."
        first = ""
    section = f"# LoRA from {name}\n\n{what} Made by `bara export`; loading needs `peft` alone:\n\n"
    saved = SavedAdapter.read(folder / first)
    section += loading_code(config, saved, str(Path(HERE) / first), library="peft")
    section += f"\n{_measured(difference)}"
    write_sections(folder, {"method": section, "rank": "", "metrics": ""}, tags=("lora", "bara"))


def _title(config: PeftConfig) -> str:
    """What the adapter is called: its family, or LoRA where the noise was fitted after training."""
    return config.ABOUT.title if isinstance(config, BayesianConfig) else "LoRA"


def _measured(difference: Difference | None) -> str:
    if difference is None:
        return ""
    inputs = f"{difference.num_inputs} held-out inputs"
    return f"Distance to the original's predictions on {inputs}: {difference}.\n\n"
