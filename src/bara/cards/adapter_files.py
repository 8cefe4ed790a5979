"""The files of an adapter's folder, and what the weights' header tells."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from bara.errors import BaraError, first_line

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MODEL_FILE = "model.safetensors"
TASK_FILE = "text_task.json"
RECIPE_FILE = "recipe.yaml"


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
