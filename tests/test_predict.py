"""bara.predict, bara.evaluate and bara.effective_rank on small models."""

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import bara
from bara import BaraError
from bara.draws.draws import attach_draws
from bara.methods.ensemble import EnsembleDraws, member_name
from bara.methods.weight_draws import Factors, WeightDraws
from bara.prediction.batches import pad_rows
from helpers import TinyConv, TinyNet, adapt, layer_posterior, stir, tiny_llama


def rows(n=9, labels=3):
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + 2 * (i * 5 % 4) for i in range(n)]
    return Dataset.from_dict(
        {
            "text": ["not for the model"] * n,
            "input_ids": [
                torch.randint(5, 20, (length,), generator=generator).tolist() for length in lengths
            ],
            "attention_mask": [[1] * length for length in lengths],
            "labels": [i % labels for i in range(n)],
        }
    )


@pytest.fixture
def model(tiny_bert):
    return stir(adapt(tiny_bert, task_type="SEQ_CLS")).eval()


def by_hand(model, data, num_draws, seed):
    """One input and one draw at a time."""
    result = torch.empty(num_draws, len(data), 3)
    with torch.no_grad():
        for draw in range(num_draws):
            for i, row in enumerate(data):
                ids = torch.tensor([row["input_ids"]])
                with bara.sampling(model, seed=seed, first_draw=draw):
                    result[draw, i] = model(input_ids=ids).logits.log_softmax(-1)
    return result


def test_prediction_is_the_mixture_over_draws(model):
    data = rows()
    predictive = bara.predict(model, data, num_draws=4, seed=3)
    expected = by_hand(model, data, 4, 3)
    torch.testing.assert_close(predictive.log_probs_draws, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(predictive.probs, expected.exp().mean(0), atol=1e-5, rtol=1e-4)
    assert predictive.labels.tolist() == data["labels"]
    assert (predictive.epistemic_uncertainty > 0).all()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_the_batch_size_changes_nothing(model, batch_size):
    whole = bara.predict(model, rows(), num_draws=4, seed=0)
    parts = bara.predict(model, rows(), num_draws=4, seed=0, batch_size=batch_size)
    torch.testing.assert_close(parts.log_probs_draws, whole.log_probs_draws, atol=1e-5, rtol=1e-4)


def test_the_batch_size_bounds_the_rows_of_a_forward_pass(model):
    seen = []
    handle = model.base_model.model.bert.embeddings.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[0])
    )
    bara.predict(model, rows(), num_draws=10, batch_size=4)
    handle.remove()
    assert max(seen) <= 4


def test_data_sets_loaders_and_batches_agree(model):
    data = rows()
    batch = pad_rows([data[i] for i in range(len(data))])
    loader = DataLoader(data, batch_size=4, collate_fn=pad_rows)
    expected = bara.predict(model, data, num_draws=2).probs
    for given in (batch, loader, [data[i] for i in range(len(data))]):
        predictive = bara.predict(model, given, num_draws=2)
        torch.testing.assert_close(predictive.probs, expected, atol=1e-5, rtol=1e-4)
        assert predictive.labels.tolist() == data["labels"]


def test_deterministic_is_the_mean_mode_and_the_model_keeps_its_mode(model):
    data = rows()
    model.train()
    predictive = bara.predict(model, data, deterministic=True)
    assert model.training
    assert predictive.num_draws == 1
    model.eval()
    with torch.no_grad():
        mean = model(input_ids=torch.tensor([data[0]["input_ids"]])).logits.softmax(-1)
    torch.testing.assert_close(predictive.probs[:1], mean, atol=1e-5, rtol=1e-4)


def test_a_plain_model_is_one_draw(tiny_bert):
    predictive = bara.predict(tiny_bert, rows(), num_draws=10)
    assert predictive.num_draws == 1
    assert predictive.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")


def noisy_lora(model):
    """Plain LoRA with noise on its weights, as TFB's."""
    model = stir(get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))).eval()
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    attach_draws(model, WeightDraws(model, {n: Factors(torch.tensor(0.5)) for n in names}))
    return model


def two_members(model):
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    model.add_adapter(member_name(1), model.peft_config["default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    attach_draws(stir(model), EnsembleDraws(model, 2))
    return model.eval()


@pytest.mark.parametrize("make", [partial(adapt, method="balora"), noisy_lora, two_members])
def test_a_merged_or_disabled_adapter_is_one_draw(make, tiny_bert):
    model = stir(make(tiny_bert)).eval()
    batch = {"input_ids": torch.randint(5, 20, (4, 6))}

    def require(num_draws):
        predictive = bara.predict(model, batch, num_draws=2)
        assert predictive.num_draws == num_draws
        if num_draws > 1:
            assert not torch.equal(*predictive.log_probs_draws)
        return predictive

    def require_one():
        mean = bara.predict(model, batch, deterministic=True)
        with torch.no_grad():
            expected = model(**batch).logits.log_softmax(-1)
        for predictive in (require(1), mean):
            torch.testing.assert_close(predictive.log_probs_draws[0], expected)

    require(2)
    with model.disable_adapter():
        require_one()
    require(2)
    if make is not two_members:  # PEFT unmerges an adapter to activate a member
        model.merge_adapter()
        require_one()
        model.unmerge_adapter()
    require(2)


def test_an_adapter_that_is_not_active_is_no_draw(tiny_bert):
    model = stir(adapt(tiny_bert)).eval()
    model.add_adapter("other", bara.BaraConfig(r=2, lora_alpha=4))
    batch = {"input_ids": torch.randint(5, 20, (4, 6))}
    for active, num_draws in (("default", 3), ("other", 3), (["default", "other"], 3), ([], 1)):
        model.base_model.set_adapter(active)
        assert bara.predict(model, batch, num_draws=3).num_draws == num_draws


def test_noise_on_a_head_outlives_a_merge(tiny_bert):
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = stir(get_peft_model(tiny_bert, config)).eval()
    (name,) = [n for n, p in model.named_parameters() if p.requires_grad and p.shape == (3, 32)]
    attach_draws(model, WeightDraws(model, {name: Factors(torch.tensor(0.5))}))
    batch = {"input_ids": torch.randint(5, 20, (4, 6))}
    model.merge_adapter()
    merged = bara.predict(model, batch, num_draws=3)
    assert merged.num_draws == 3
    assert (merged.epistemic_uncertainty > 0).all()
    with model.disable_adapter():
        assert bara.predict(model, batch, num_draws=3).num_draws == 1


def test_evaluate_measures_and_detects(model):
    evaluation = bara.evaluate(model, rows(), ood=rows(5).remove_columns("labels"), num_draws=3)
    predictive = bara.predict(model, rows(), num_draws=3)
    labels = torch.tensor(rows()["labels"])
    accuracy = (predictive.probs.argmax(1) == labels).float().mean().item()
    nll = -predictive.probs[range(9), labels].log().mean().item()
    assert evaluation.metrics["accuracy"] == pytest.approx(accuracy)
    assert evaluation.metrics["nll"] == pytest.approx(nll, rel=1e-5)
    assert {"ece", "brier", "aurc", "ood_auroc", "ood_fpr95"} <= evaluation.metrics.keys()


def test_a_batch_with_an_adapter_for_each_row_is_refused(model):
    """The active adapter would answer for all of them."""
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "adapter_names": ["default"] * 2}
    with pytest.raises(BaraError, match=r"adapter_names.*set_adapter"):
        bara.predict(model, batch, num_draws=2)


def test_regression_moments_are_those_of_the_draws():
    torch.manual_seed(0)
    model = stir(adapt(TinyNet(6, 1), target_modules=["layer"])).eval()
    x = torch.randn(5, 6)
    predictive = bara.predict(model, {"x": x}, num_draws=6, seed=1, noise_variance=0.3)
    with torch.no_grad():
        draws = []
        for draw in range(6):
            with bara.sampling(model, seed=1, first_draw=draw):
                draws.append(model(x=x)["logits"][:, 0])
    draws = torch.stack(draws)
    torch.testing.assert_close(predictive.mean, draws.mean(0))
    torch.testing.assert_close(predictive.epistemic_variance, draws.var(0, unbiased=False))
    torch.testing.assert_close(predictive.aleatoric_variance, torch.full((5,), 0.3))


def test_images():
    model = stir(adapt(TinyConv(), target_modules=["conv"])).eval()
    images = torch.randn(3, 3, 5, 5)
    predictive = bara.predict(model, {"pixel_values": images}, num_draws=4)
    assert predictive.probs.shape == (3, 4)
    assert bara.effective_rank(model, {"pixel_values": images}).soft.shape == (1, 3)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_effective_rank_by_hand(granularity):
    torch.manual_seed(0)
    model = adapt(TinyNet(), target_modules=["layer"], granularity=granularity)
    stir(model).eval()
    layer, posterior = layer_posterior(model)
    x = torch.randn(4, 3, 6)
    mask = torch.ones(4, 3)
    mask[0, 2] = 0
    rank = bara.effective_rank(model, {"x": x, "attention_mask": mask})
    with torch.no_grad():
        u = x @ layer.lora_A["default"].weight.T
        shift = 0.66 * torch.log(torch.tensor(0.1 / 1.1))
        z = torch.sigmoid(100 * posterior.global_logit - shift)
        for i in range(4):
            tokens = u[i, : int(mask[i].sum())]
            if granularity == "sequence":
                tokens = tokens.mean(0, keepdim=True)
            h = tokens / tokens.square().mean(-1, keepdim=True).sqrt()
            local = 100 * (h @ posterior.gate_weight.T / 2 + posterior.gate_bias)
            p = z * torch.sigmoid(local - shift)
            assert rank.soft[0, i].item() == pytest.approx(p.sum(-1).mean().item(), rel=1e-4)
            hard = (p > 0.5).sum(-1).float().mean().item()
            assert rank.hard[0, i].item() == pytest.approx(hard)
    assert rank.layers == ("layer",)
    assert rank.max_rank == (4,)
    assert rank.s_bar == pytest.approx(rank.soft.mean().item())


def test_effective_rank_keeps_the_order_of_the_data(model):
    data = rows()
    together = bara.effective_rank(model, data, batch_size=2)
    for i in (0, 3, 8):
        alone = bara.effective_rank(model, data.select([i]))
        torch.testing.assert_close(alone.soft[:, 0], together.soft[:, i], atol=1e-4, rtol=1e-4)
    assert together.per_input.std() > 0


@pytest.mark.parametrize("method", ["balora"])
def test_a_family_without_gates_has_full_rank(tiny_bert, method):
    model = adapt(tiny_bert, method, task_type="SEQ_CLS")
    assert bara.effective_rank(model, rows()).s_bar == 4


def test_bad_input(model, tiny_bert):
    with pytest.raises(BaraError, match="num_draws must be at least 1, got 0"):
        bara.predict(model, rows(), num_draws=0)
    for options in ({}, {"deterministic": True}):
        with pytest.raises(BaraError, match=r"num_draws must be a whole number, got 1000000000.0"):
            bara.predict(model, rows(), num_draws=1e9, **options)
    with pytest.raises(BaraError, match="empty"):
        bara.predict(model, rows().select([]))
    with pytest.raises(BaraError, match="tokenise it first"):
        bara.predict(model, Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(BaraError, match=r"data must be .* got int"):
        bara.predict(model, 3)
    with pytest.raises(BaraError, match="batch_size must be at least 1"):
        bara.predict(model, rows(), batch_size=0)
    with pytest.raises(BaraError, match="labels"):
        bara.evaluate(model, rows().remove_columns("labels"))
    partly = [{**row, "labels": None if number == 1 else 0} for number, row in enumerate(rows())]
    with pytest.raises(BaraError, match="'labels' is empty in some rows"):
        bara.predict(model, partly)
    with pytest.raises(BaraError, match="some rows have labels and others none"):
        bara.predict(model, partly, num_draws=1, batch_size=1)
    with pytest.raises(BaraError, match="noise_variance must be at least 0"):
        bara.predict(model, rows(), noise_variance=-1)
    with pytest.raises(BaraError, match="no Bayesian adapter"):
        bara.effective_rank(type(tiny_bert)(tiny_bert.config), rows())
    language = adapt(tiny_llama(), task_type="CAUSAL_LM")
    with pytest.raises(BaraError, match="logits of shape"):
        bara.predict(language, {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    broken = copy.deepcopy(model)
    layer_posterior(broken)[1].noise_logit.data.fill_(float("nan"))
    with pytest.raises(BaraError, match="not finite"):
        bara.predict(broken, rows())
    with pytest.raises(BaraError, match="No Bayesian adapter is active"), model.disable_adapter():
        bara.effective_rank(model, rows())


def test_the_mean_is_the_mean_inside_a_sampling_context(model):
    expected = bara.predict(model, rows(), deterministic=True).probs
    rank = bara.effective_rank(model, rows()).soft
    with bara.sampling(model, seed=0):
        inside = bara.predict(model, rows(), deterministic=True).probs
        rank_inside = bara.effective_rank(model, rows()).soft
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(rank_inside, rank)


def test_batches_that_are_not_mappings_of_tensors_are_refused(model):
    with pytest.raises(BaraError, match="mapping of names to tensors"):
        bara.predict(model, {"input_ids": [[5, 6]]})
    pairs = DataLoader(torch.utils.data.TensorDataset(torch.ones(2, 3, dtype=torch.long)))
    with pytest.raises(BaraError, match=r"mapping of names to tensors.*got list"):
        bara.predict(model, pairs)


def test_loaders_without_a_length(model):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([rows()[i] for i in range(4)])

    loader = DataLoader(Stream(), batch_size=2, collate_fn=pad_rows)
    expected = bara.predict(model, rows().select(range(4))).probs
    torch.testing.assert_close(bara.predict(model, loader).probs, expected, atol=1e-5, rtol=1e-4)
