"""The files of an adapter's folder, and what the configuration and the weights' header tell."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bara.errors import BaraError, first_line
from bara.schema import field_types, mapping_of, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MODEL_FILE = "model.safetensors"
TASK_FILE = "text_task.json"
RECIPE_FILE = "recipe.yaml"
TOKENIZER_FILE = "tokenizer_config.json"
PROCESSOR_FILE = "preprocessor_config.json"
CALIBRATIONS = ABSTENTION_FILE, CONFORMAL_FILE = ("abstention.json", "conformal.safetensors")
"""What was calibrated on an adapter's weights, and holds for these alone."""
LOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, "config.json", MODEL_FILE)
"""What PEFT and transformers take a folder for, an adapter's or a model's."""
MEND = "train again or restore the file"
WIDER = {
    "peft_type": str,
    "task_type": str | None,
    "lora_alpha": float,
    "init_lora_weights": bool | str,
    "generator_seed": int | None,
}
"""Types of fields of PEFT's configurations that take more than their declaration says."""


def config_types(config: type) -> dict[str, Any]:
    """Names and types of what `adapter_config.json` may hold for a class of configurations.

    What the class has `RETIRED`, fields that earlier versions wrote, is among them.
    """
    types = field_types(config)
    types |= {name: kind for name, kind in WIDER.items() if name in types}
    return types | dict.fromkeys(getattr(config, "RETIRED", ()), Any)


def check_config(path: Path, config: type) -> None:
    """Holds `adapter_config.json` against its class.

    Raises:
        BaraError: a field is unknown, as one of a later version is, or of the wrong type.
    """
    read_json(path, _config_schema(config), f"{MEND}, or install the version that wrote it")


@cache
def _config_schema(config: type) -> Any:
    return mapping_of(config_types(config))


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the saved tensors, from the file's header.

    Raises:
        BaraError: there are no weights, they are a pickle, or the file is cut off or damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / PICKLE_FILE).exists():
            raise BaraError(
                f"{folder / PICKLE_FILE} is a pickle, which can run any code when it is loaded; "
                "where you trust it, load it with PEFT and save it again with save_pretrained, "
                f"which writes {WEIGHTS_FILE}"
            )
        raise BaraError(f"{folder} has no {WEIGHTS_FILE}; train again or restore the file")
    try:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise BaraError(
            f"{path} is cut off or damaged ({first_line(error)}); train again or restore the file"
        ) from error
