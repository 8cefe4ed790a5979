"""What the code runs on: the processor, the libraries, and how loud they are."""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from importlib.metadata import version
from typing import Any

import torch

from bara.errors import BaraError

# PEFT imports bitsandbytes where it is installed, which on some processors then says, with every
# command, that it found no faster kernel for 4-bit weights.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


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


def accelerator() -> str:
    """The GPU that is used, or the processor where there is none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        more = f", the first of {count}" if count > 1 else ""
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB{more}"
    return f"no GPU; {os.cpu_count()} processors, {torch.get_num_threads()} threads"


def bfloat16_speed(size: int = 1024, repeats: int = 3) -> float:
    """How many times faster than float32 a matrix product in bfloat16 is here, roughly."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        times = []
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return seconds(torch.float32) / seconds(torch.bfloat16)


def gguf_stays_packed() -> bool:
    """Whether transformers keeps a GGUF file's weights packed unless told otherwise: since 5.17."""
    import transformers

    return hasattr(transformers, "GgufConfig")


def ray_cluster(address: str | None) -> Any:
    """The package `ray`, connected to a cluster.

    Args:
        address: of the cluster; None joins the one that the environment names, or starts a local
            one.

    Raises:
        BaraError: Ray is missing, or the cluster cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BaraError('Ray is missing; run `pip install "bara-peft[ray]"`') from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BaraError(f"cannot reach the Ray cluster: {error}") from error
    return ray
