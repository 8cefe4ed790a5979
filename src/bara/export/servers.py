"""What inference servers load of a LoRA folder, read from the source of the versions named.

vLLM 0.33.0, `vllm/lora/peft_helper.py`: rank and scaling of a layer by `rank_pattern` and
`alpha_pattern` as PEFT finds them, `use_rslora` too; `modules_to_save` may name `classifier` and
`score` only; no bias, no DoRA. Earlier versions read `r`, `lora_alpha` and `use_rslora` alone, and
no `modules_to_save`.

SGLang 0.5.23, `sglang/srt/lora/lora_config.py` and `lora.py`: the scaling of all layers is
`lora_alpha / r`, and the A of q, k and v are stacked as if all had rank `r`; neither patterns nor
`use_rslora` nor `modules_to_save` are read.

Whether a server serves adapters on the base model's architecture at all, it says itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

from peft import LoraConfig
from torch import Tensor

from bara.errors import BaraError

Server = Literal["vllm", "sglang"]
VERSIONS: dict[Server, str] = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}
HEADS = ("classifier", "score")


def check_server(server: str) -> Server:
    """The server, if it is one that is known here.

    Raises:
        BaraError: it is not.
    """
    if server not in get_args(Server):
        known = " or ".join(get_args(Server))
        raise BaraError(f"the server must be {known}, not {server!r} (--server)")
    return cast(Server, server)


def refusal(server: Server, config: LoraConfig, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a server cannot load an adapter, or would get it wrong; None if it loads it.

    Args:
        server: which.
        config: of the adapter.
        tensors: what PEFT saves of it.
    """
    name = VERSIONS[server]
    factors = {key: value for key, value in tensors.items() if ".lora_" in key}
    if convolutions := [key for key, value in factors.items() if value.dim() > 2]:
        layer = convolutions[0].partition(".lora_")[0]
        return f"{name} serves LoRA on linear layers, and {layer} is a convolution"
    if config.lora_bias or config.bias != "none":
        return f"{name} serves no LoRA adapter with biases"
    rest = sorted(tensors.keys() - factors.keys())
    if server == "sglang":
        if rest:
            return f"{name} reads no modules_to_save, such as {rest[0]}, and would answer without"
        if config.rank_pattern or config.alpha_pattern or config.use_rslora:
            return f"{name} reads r and lora_alpha alone: export without --patterns"
        return None
    heads = {key.rpartition(".")[0] for key in rest}
    foreign = [head for head in sorted(heads) if head.rpartition(".")[2] not in HEADS]
    if foreign:
        return f"{name} loads one linear `classifier` or `score` as a head, and not {foreign[0]}"
    if len(heads) > 1:
        return f"{name} loads one head, and this adapter has {len(heads)}"
    return None
