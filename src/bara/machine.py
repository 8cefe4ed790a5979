"""What the code runs on: the processor, the libraries, and how loud they are."""

from __future__ import annotations

import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any, Literal, TypeVar, get_args

import torch

from bara.errors import BaraError

Item = TypeVar("Item")
Result = TypeVar("Result")
Executor = Literal["local", "ray"]
"""Who does the work: this machine, or a Ray cluster."""

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


def check_executor(executor: str) -> None:
    """Raises BaraError if there is no such executor."""
    if executor not in get_args(Executor):
        raise BaraError(f"executor must be 'local' or 'ray', not {executor!r}")


def gpus_each(ray: Any, num_gpus: float | None) -> float:
    """GPUs of each worker on a Ray cluster: as many as are given; else 1 where there are any."""
    if num_gpus is not None:
        return num_gpus
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def map_on_ray(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    address: str | None = None,
    at_once: int | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
) -> Iterator[tuple[Item, Result | Exception]]:
    """Calls a function on every item, each in a process of its own on a Ray cluster.

    The processes work in this one's folder, where their machine has it.

    Args:
        function, items: what is called, and on what.
        address: see `ray_cluster`.
        at_once: at most so many at a time; None leaves it to the cluster.
        num_cpus, num_gpus: what each takes; None gives each a GPU where there are any.

    Yields:
        An item and what the function returned, in the order in which they end; Ray's error in place
        of it where the function raised one, or its process was lost.

    Raises:
        BaraError: Ray is missing, or the cluster cannot be reached.
    """
    ray = ray_cluster(address)
    # max_calls: the memory of one call is not the next one's
    options = {"num_cpus": num_cpus, "num_gpus": gpus_each(ray, num_gpus), "max_calls": 1}
    remote = ray.remote(max_retries=0, **options)(_call_in)
    shared, here, left = ray.put(function), os.getcwd(), iter(items)
    running: dict[Any, Item] = {}
    try:
        while True:
            room = None if at_once is None else at_once - len(running)
            running |= {remote.remote(shared, here, item): item for item in islice(left, room)}
            if not running:
                return
            ended, _ = ray.wait(list(running))
            yield running.pop(ended[0]), _result(ray, ended[0])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        return error


def _call_in(function: Callable[[Item], Result], folder: str, item: Item) -> Result:
    if os.path.isdir(folder):
        os.chdir(folder)
    quieten_libraries()
    return function(item)
