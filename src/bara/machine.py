"""What the code runs on: the processor, the libraries, and how loud they are."""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import version

import torch


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def versions() -> dict[str, str]:
    """What numbers depend on: the packages' versions and the machine."""
    packages = ("bara-peft", "torch", "transformers", "peft")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "precision": "bfloat16 autocast" if fast_bfloat16() else "float32",
    }


LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub")


def quieten_libraries() -> None:
    """Keep other libraries' warnings and bars away from standard error."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
