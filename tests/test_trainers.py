"""AdaLoRA's budget, IVON's posterior and PEFT's own probabilistic adapters."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PveraConfig, get_peft_model
from transformers import TrainingArguments

import bara
from bara.draws.draws import attach_draws
from bara.methods import WeightDraws
from bara.methods.adalora import AdaloraTrainer
from bara.methods.ivon import IvonOptions, IvonTrainer, ivon_factors
from bara.methods.probabilistic_peft import MontecloraTrainer, PveraDraws
from bara.methods.table import METHODS
from bara.training.trainer import AdapterTrainer
from helpers import TinyNet

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
DATA = Dataset.from_dict({"x": X.tolist(), "labels": (X @ torch.ones(6, 5)).tolist()})


def training(method, tmp_path, options=None, **arguments):
    own = options or METHODS[method].own_options({})
    config = METHODS[method].config(
        **METHODS[method].config_options({"r": 4, "lora_alpha": 8}), target_modules=["layer"]
    )
    torch.manual_seed(0)
    model = get_peft_model(TinyNet(), config)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        label_names=["labels"],
        **{"num_train_epochs": 10, "learning_rate": 1e-2, **arguments},
    )
    trainer = METHODS[method].trainer(model=model, args=args, train_dataset=DATA, options=own)
    trainer.train()
    trainer.finish()
    return trainer


def test_adalora_ends_with_its_final_budget(tmp_path):
    trainer = training("adalora", tmp_path)
    assert isinstance(trainer, AdaloraTrainer)
    config = trainer.model.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step) == (4, 3, 40)
    assert (config.tinit, config.tfinal) == (4, 20)
    assert sum(sum(kept) for kept in config.rank_pattern.values()) == 3
    values = next(p for n, p in trainer.model.named_parameters() if "lora_E" in n)
    assert (values != 0).sum() == 3  # the fourth singular value is masked


def test_adalora_refuses_a_schedule_without_reduction(tmp_path):
    from peft import AdaLoraConfig

    model = get_peft_model(
        TinyNet(), AdaLoraConfig(target_modules=["layer"], tinit=3, tfinal=3, total_step=10**9)
    )
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=5, disable_tqdm=True
    )
    with pytest.raises(bara.BaraError, match="leave none of the 5 steps"):
        AdaloraTrainer(model=model, args=args, train_dataset=DATA).train()


def test_ivon_solves_a_quadratic(tmp_path):
    """On a linear-Gaussian model the posterior is known: precision ess (hessian + weight_decay)."""
    ivon = pytest.importorskip("ivon")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False)
    x = torch.randn(64, 3) * torch.tensor([0.5, 1.0, 2.0])
    y = x @ torch.tensor([[1.0], [-1.0], [0.5]])
    options = {"ess": 64.0, "weight_decay": 0.1, "beta2": 0.995, "hess_init": 1.0}
    optimiser = ivon.IVON(model.parameters(), lr=0.1, **options)
    for _ in range(2000):
        with optimiser.sampled_params(train=True):
            optimiser.zero_grad()
            (0.5 * (model(x) - y).square().mean()).backward()
        optimiser.step()
    factors = ivon_factors(model, optimiser)["weight"]
    hessian = x.square().mean(0)  # the diagonal of the mean loss's Hessian
    expected = (64 * (hessian + 0.1)).rsqrt()
    torch.testing.assert_close(factors.scale[0], expected, rtol=0.15, atol=0)


def test_ivon_draws_have_the_optimisers_variance(tmp_path):
    pytest.importorskip("ivon")
    trainer = training("ivon", tmp_path, IvonOptions(ess=1e3, hess_init=0.1))
    assert isinstance(trainer, IvonTrainer)
    source = trainer.model.__dict__["bara_draws"]
    assert isinstance(source, WeightDraws)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_A" in n)
    mean = parameter.detach().clone()
    draws = []
    for d in range(1000):
        with source.drawing(bara.draws.draws.Draws(1, 0, first=d)):
            draws.append(parameter.detach().clone())
    torch.testing.assert_close(parameter.detach(), mean)
    group = trainer._ivon().param_groups[0]
    index = [n for n, p in trainer.model.named_parameters() if p.requires_grad].index(name)
    sizes = [p.numel() for p in group["params"]]
    variance = 1 / (1e3 * group["hess"].split(sizes)[index]).view(4, 6)
    torch.testing.assert_close(torch.stack(draws).var(0), variance, rtol=0.3, atol=0)
    torch.testing.assert_close(torch.stack(draws).mean(0), mean, rtol=0, atol=0.02)


def test_ivon_learns_and_its_learning_rate_is_the_largest_step(tmp_path):
    pytest.importorskip("ivon")
    start = {n: p.detach().clone() for n, p in training_model().named_parameters()}
    trainer = training("ivon", tmp_path, num_train_epochs=1, lr_scheduler_type="constant")
    moved = max((p - start[n]).abs().max() for n, p in trainer.model.named_parameters())
    assert 0.5e-2 < moved <= 4 * 1e-2 + 1e-6  # four steps
    trainer = training("ivon", tmp_path, num_train_epochs=60)
    first, last = trainer.state.log_history[0], trainer.evaluate(DATA)
    assert last["eval_loss"] < 0.5 * base_loss()
    assert first


def training_model():
    torch.manual_seed(0)
    return get_peft_model(TinyNet(), LoraConfig(r=4, lora_alpha=8, target_modules=["layer"]))


def base_loss():
    with torch.no_grad():
        return training_model()(x=X, labels=X @ torch.ones(6, 5))["loss"].item()


def test_ivon_refuses_accumulation(tmp_path):
    pytest.importorskip("ivon")
    with pytest.raises(bara.BaraError, match="gradient_accumulation_steps must be 1"):
        training("ivon", tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(bara.BaraError, match="must be > 0"):
        IvonOptions(ess=0.0)


def test_monteclora_trains_with_its_regulariser(tmp_path):
    trainer = training("monteclora", tmp_path, num_train_epochs=1)
    assert isinstance(trainer, MontecloraTrainer)
    assert isinstance(trainer, AdapterTrainer)
    model = trainer.model.train()
    batch = {"x": X, "labels": X @ torch.ones(6, 5)}
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    regulariser = model.base_model._get_monteclora_loss().detach()
    assert abs(regulariser) > 1e-4
    torch.testing.assert_close(loss, outputs["loss"] + regulariser)


def test_pvera_draws_are_its_gaussian():
    torch.manual_seed(0)
    model = get_peft_model(TinyNet(), PveraConfig(r=4, target_modules=["layer"])).eval()
    layer = next(m for m in model.modules() if hasattr(m, "pvera_lambda_b"))
    with torch.no_grad():
        layer.pvera_lambda_b["default"].fill_(0.5)
        attach_draws(model, PveraDraws(model))
        x = X[:1]
        mean = model(x=x)["logits"]
        draws = []
        for d in range(3000):
            with bara.sampling(model, seed=0, first_draw=d):
                draws.append(model(x=x)["logits"])
        torch.testing.assert_close(model(x=x)["logits"], mean)
        a, b = layer.pvera_A["default"], layer.pvera_B["default"]
        latent = layer.pvera_lambda_d["default"] * (x @ a[:, :6].T)
        _, log_variance = latent.chunk(2, dim=-1)
        matrix = 0.5 * b[:5]
        covariance = matrix @ torch.diag(log_variance[0].exp()) @ matrix.T
    with model.disable_adapter():
        assert bara.predict(model, {"x": x}, num_draws=2).num_draws == 1
    assert bara.predict(model, {"x": x}, num_draws=2).num_draws == 2
    sampled = torch.cat(draws)
    bound = 0.15 * covariance.diagonal().max()
    assert (torch.cov(sampled.T) - covariance).abs().max() < bound
    assert (sampled.mean(0) - mean[0]).abs().max() < 6 * sampled.std(0).max() / 3000**0.5
