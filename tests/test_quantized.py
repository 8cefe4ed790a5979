"""BaRA and BaLoRA on bitsandbytes' 8-bit and 4-bit layers, as far as a CPU runs them."""

import json

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

import bara
from bara.finetuning.load import load_adapter
from conftest import write_jsonl
from helpers import adapt, gradients, stir, tiny_llama
from language_models import word_tokenizer, words

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*may get different generations"),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast"),
]

IDS = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj"]
MODES = [(method, bits) for method in ("bara", "balora") for bits in (8, 4)]


def plain():
    """A language model of bitsandbytes' block size, 64."""
    return tiny_llama(hidden_size=64, intermediate_size=64, num_key_value_heads=4)


def quantized(bits):
    """The model with query and value projections that hold 8-bit or 4-bit weights."""
    model = plain()
    for name, linear in list(model.named_modules()):
        if name.rpartition(".")[2] not in TARGETS:
            continue
        size = (linear.in_features, linear.out_features)
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(
                *size,
                bias=False,
                compute_dtype=torch.float32,
                quant_type="nf4",
                compress_statistics=False,
            )
            # its inference kernel for some CPUs, in bfloat16, which changes the weights' layout
            layer.support_avx512bf16_for_cpu = False
        layer.load_state_dict(linear.state_dict())
        model.set_submodule(name, layer.to("cpu"))  # quantises
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def dequantized(layer):
    """The weights of a quantised layer as floats."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.data.float() * layer.state.SCB.view(-1, 1) / 127


def adapted(method, bits, **options):
    model = adapt(quantized(bits), method, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    names = names_of(model)
    assert len(names) == 4
    return model, names


def names_of(model):
    """The adapted layers."""
    return [n for n, m in model.named_modules() if hasattr(m, "lora_posterior")]


@pytest.mark.parametrize(("method", "bits"), MODES)
def test_the_quantised_model_is_unchanged_at_the_start(method, bits):
    base = quantized(bits).eval()
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        model = adapt(base, method, target_modules=TARGETS, task_type="CAUSAL_LM").eval()
        torch.testing.assert_close(model(input_ids=IDS).logits, before)
        with bara.sampling(model, seed=0):
            torch.testing.assert_close(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize(("method", "bits"), MODES)
def test_training_is_that_of_the_dequantised_model(method, bits):
    """The same loss and gradients as with the dequantised weights in ordinary linear layers."""
    model, names = adapted(method, bits, local_kl_weight=0.1)
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "local_kl_weight": 0.1}
    reference = adapt(plain(), method, **options)
    if bits == 8:  # quantises on its first use
        with torch.no_grad():
            model.train()(input_ids=IDS)
    for name in names:
        weight = dequantized(model.get_submodule(name).base_layer)
        reference.get_submodule(name).base_layer.weight.data = weight
    results = []
    for each in (model, reference):
        stir(each, 0.1).train()
        with bara.sampling(each, seed=0):
            loss = each(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append((loss.detach(), gradients(each)))
    (loss, ours), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert ours.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(ours[name], expected[name], rtol=2e-4, atol=2e-4 * scale)


@pytest.mark.parametrize(("method", "bits"), MODES)
def test_a_saved_adapter_comes_back_on_a_quantised_model(method, bits, tmp_path):
    model, _ = adapted(method, bits)
    stir(model, 0.1).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(bits), tmp_path).eval()
    with torch.no_grad(), bara.sampling(model, seed=3), bara.sampling(loaded, seed=3):
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_adds_the_mean_and_quantises_it_again(bits):
    """To the accuracy of the quantised weights, which is all that PEFT promises."""
    model, names = adapted("balora", bits)
    stir(model, 0.1)
    if bits == 8:
        with torch.no_grad():
            model.eval()(input_ids=IDS)
    layers = [model.get_submodule(name) for name in names]
    expected = [
        dequantized(layer.base_layer)
        + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for layer in layers
    ]
    model.merge_adapter()
    for layer, weight in zip(layers, expected, strict=True):
        if bits == 8:
            with torch.no_grad():
                layer.base_layer(torch.zeros(1, weight.shape[1]))
        # half of the widest gap between neighbouring values, relative to the largest of a row
        gap = 0.6 / 127 if bits == 8 else 0.16
        error = (dequantized(layer.base_layer) - weight).abs()
        assert (error <= gap * weight.abs().amax(dim=1, keepdim=True)).all()


def test_merging_an_input_dependent_gate_is_refused():
    model, _ = adapted("bara", 8)
    stir(model, 0.1)
    with pytest.raises(bara.BaraError, match="calibrate_gates"):
        model.merge_adapter()


def test_qlora_from_a_checkpoint_to_a_checkpoint(tmp_path):
    """transformers quantises, Trainer trains with checkpointing, PEFT loads the adapter again."""
    base = tmp_path / "base"
    plain().save_pretrained(base)

    def load():
        options = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, quantization_config=options, device_map="cpu"
        )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        return model

    config = bara.BaraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(load()), config)
    assert isinstance(model.get_submodule(names_of(model)[0]).base_layer, bnb.nn.Linear4bit)
    rows = {"input_ids": IDS.tolist(), "labels": IDS.tolist()}
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    transformers.Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict(rows),
        callbacks=[bara.BayesianCallback()],
    ).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        with bara.sampling(model, seed=3), bara.sampling(loaded, seed=3):
            ours = model(input_ids=IDS).logits
            torch.testing.assert_close(loaded(input_ids=IDS).logits, ours)
        with model.disable_adapter():
            assert (model(input_ids=IDS).logits - ours).abs().max() > 1e-3


def test_qlora_from_the_command_line(tmp_path, run):
    """The base is loaded in 4 bits for training and again for generation."""
    plain().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": words(i, i + 1), "completion": words(i + 2)} for i in range(4, 30)]
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    recipe = {
        "model": str(tmp_path / "base"),
        "data": str(write_jsonl(tmp_path / "table.jsonl", rows)),
        "output": str(tmp_path / "adapter"),
        "task": "causal-lm",
        "model_options": {"quantization_config": quantization},
        "training": {"num_train_epochs": 1, "use_cpu": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run("train", "--config", tmp_path / "recipe.yaml")
    model, _, _ = load_adapter(tmp_path / "adapter")
    names = names_of(model)
    assert names
    assert all(
        isinstance(model.get_submodule(name).base_layer, bnb.nn.Linear4bit) for name in names
    )
    assert run("generate", tmp_path / "adapter", words(4, 5), "--max-new-tokens", 2)
