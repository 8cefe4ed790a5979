"""Servers' rules for LoRA folders, written down from their source, and a server that follows them.

See `bara.export.servers` for the versions and the files.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def _layers(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            yield name.removeprefix("base_model.model."), a, tensors[f"{name}.lora_B.weight"]


def vllm(folder: Path) -> dict[str, Tensor]:
    """vLLM 0.33.0: `get_rank_and_scaling`, `_match_pattern`, `validate_legal`."""
    config, tensors = _read(folder)
    assert set(config["modules_to_save"] or []) <= {"classifier", "score"}
    assert not any([config["use_dora"], config["lora_bias"], config["bias"] != "none"])

    def found(pattern: dict[str, Any], name: str, default: Any) -> Any:
        hits = (v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name))
        return next(hits, default)

    deltas = {}
    for name, a, b in _layers(tensors):
        rank = found(config["rank_pattern"] or {}, name, config["r"])
        alpha = found(config["alpha_pattern"] or {}, name, config["lora_alpha"])
        assert a.shape[0] == rank
        deltas[name] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a
    return deltas


def older_vllm(folder: Path) -> dict[str, Tensor]:
    """vLLM before it read patterns: `PEFTHelper.__post_init__`, one scaling for all layers."""
    config, tensors = _read(folder)
    r = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return {name: config["lora_alpha"] / r * b @ a for name, a, b in _layers(tensors)}


def sglang(folder: Path) -> dict[str, Tensor]:
    """SGLang 0.5.23: `LoRAAdapter.scaling`; buffers of rank `r` for every layer."""
    config, tensors = _read(folder)
    scaling = config["lora_alpha"] / config["r"]
    return {
        name: scaling * b[:, : config["r"]] @ a[: config["r"]] for name, a, b in _layers(tensors)
    }


class LoraServer:
    """vLLM's routes over a base model: adapters loaded by vLLM's rule, added to its weights."""

    def __init__(self, base: Any, tokenizer: Any) -> None:
        self.base, self.tokenizer = base, tokenizer
        self.models: dict[str, Any] = {}
        self.keys: set[str | None] = set()

    def load(self, name: str, folder: Path) -> None:
        """What `/v1/load_lora_adapter` does."""
        model = copy.deepcopy(self.base)
        with torch.no_grad():
            for layer, delta in vllm(folder).items():
                model.get_submodule(layer).weight += delta
            for key, tensor in _read(folder)[1].items():
                if ".lora_" not in key:
                    model.get_parameter(key.removeprefix("base_model.model.")).copy_(tensor)
        self.models[name] = model.eval()

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and content for a request."""
        if route == "/v1/load_lora_adapter":
            if body["lora_name"] in self.models:
                return 400, {"message": f"{body['lora_name']} has already been loaded"}
            self.load(body["lora_name"], Path(body["lora_path"]))
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        model = self.models.get(body["model"])
        if model is None:
            return 404, {"message": "no such model"}
        ids = self.tokenizer(body.get("prompt") or body.get("input"))["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        if route == "/classify":
            return 200, {"data": [{"probs": logits.softmax(-1).tolist()}]}
        logs = logits.log_softmax(-1)
        tokens = [
            {str(token): {"logprob": logs[i, token].item(), "rank": 1}}
            for i, token in enumerate(ids[1:])
        ]
        return 200, {"choices": [{"text": "", "prompt_logprobs": [None, *tokens]}]}

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """The address of the server, which runs as long as the context."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                served.keys.add(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = served.answer(self.path, body)
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
