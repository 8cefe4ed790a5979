"""The ELBO of one model: what its forward passes share, and the KL that joins the loss.

A root hook opens a `ForwardPass` for every call of the adapted model. The layers read from it what
they cannot see themselves (padding, draws) and hand their KL up to it; when the call ends the hook
adds the weighted KL to `outputs.loss`, so that any trainer that uses the model's own loss trains
the ELBO.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bara.adapter.call_inputs import (
    batch_size_of,
    loss_items,
    position_weights_of,
)
from bara.adapter.forward_pass import ForwardPass
from bara.draws.draws import Draws, DrawSource
from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig
from bara.posteriors.posterior import Posterior
from bara.posteriors.rank_space import RankSpace
from bara.posteriors.schedule import LossSchedule, rise

HOLD = 0.4
"""Part of the warm-up during which the KL has no weight."""


class Elbo(DrawSource):
    """What all forward passes of one adapted model share. Lives on the model as `bara_elbo`."""

    batched = True

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, BayesianConfig] = {}
        self.schedules: dict[str, LossSchedule] = {}
        self.progress: float | None = None
        self._warned_of_progress = False
        self.draws: Draws | None = None
        self.adapter_names: tuple[str, ...] | None = None
        self.forward: ForwardPass | None = None  # the open one, or the one being differentiated
        self.last: ForwardPass | None = None  # the last training pass
        self.observers: list[Callable[[str, Posterior, RankSpace], None]] = []  # told every layer
        self._arguments = list(inspect.signature(model.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    @staticmethod
    def of(model: nn.Module) -> Elbo | None:
        """The state of an adapted model, however it is wrapped; None if it is not Bayesian."""
        for module in model.modules():
            elbo = module.__dict__.get("bara_elbo")
            if isinstance(elbo, Elbo):
                return elbo
        return None

    @classmethod
    def attached(cls, root: nn.Module) -> Elbo:
        """The state of a root model, made at the first call."""
        elbo = root.__dict__.get("bara_elbo")
        if elbo is None:
            elbo = root.__dict__["bara_elbo"] = cls(root)
        return elbo

    def current(self) -> ForwardPass | None:
        """The open forward pass, or in a backward pass the one that is being differentiated."""
        forward = self.forward
        if forward is None or forward.open:
            return forward
        recomputing = torch._C._current_graph_task_id() != -1
        return forward if recomputing else None

    @contextmanager
    def drawing(self, draws: Draws | None) -> Iterator[None]:
        """Forward passes inside use these draws, or with None the posterior mean."""
        before = self.draws
        self.draws = draws
        try:
            yield
        finally:
            self.draws = before

    @contextmanager
    def observing(self, observe: Callable[[str, Posterior, RankSpace], None]) -> Iterator[None]:
        """Every adapted layer's forward pass inside calls `observe(layer, posterior, space)`, with
        autocast off."""
        self.observers.append(observe)
        try:
            yield
        finally:
            self.observers.remove(observe)

    def detach(self, root: nn.Module) -> None:
        """Removes the state and its hooks from a model that has been unloaded."""
        for handle in self._handles:
            handle.remove()
        root.__dict__.pop("bara_elbo", None)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model starts without the graphs of passes it has not made
        transient: dict[str, Any] = {"forward": None, "last": None, "draws": None, "observers": []}
        return {**self.__dict__, **transient}

    # -- one forward pass ----------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        training = model.training and torch.is_grad_enabled()
        forward = ForwardPass(
            batch_size=batch_size_of(given),
            weights=tuple(position_weights_of(given)),
            draws=self.draws,
            adapter_names=self.adapter_names,
            training=training,
        )
        if training:
            self._check_consumed()
            labels = loss_items(model, given)
            if labels is not None:
                forward.items = labels.flatten(1).sum(1) if labels.dim() > 1 else labels
                # With the micro-batch's mean loss in hand one factor scales data and KL alike. Not
                # every model's loss honours num_items_in_batch, so it never sees it.
                total = kwargs.pop("num_items_in_batch", None)
                if total is not None:
                    forward.share = labels.sum() / total
        self.forward = forward
        return args, kwargs

    @torch.compiler.disable
    def _end(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> Any:
        forward, self.forward = self.forward, None
        if forward is None:
            return outputs
        forward.open = False
        # checkpointing starts with the last layer again, which must compute what it did before
        forward.latest_input = None
        if outputs is None or not (forward.training or forward.trainable):
            return outputs
        if forward.training:
            self.last = forward
            forward.reduce()
            forward.kl = self._weighted_kl(forward)
        self._watch(forward, outputs)
        if kwargs.get("fused_lm_head"):
            return outputs  # TRL's trainers use its log-probabilities, not its loss: see KLMixin
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        return self._complete(outputs, forward, has_labels=given.get("labels") is not None)

    def _weighted_kl(self, forward: ForwardPass) -> Tensor | None:
        """beta_g / N KL_global + beta_l KL_local, summed over the active adapters."""
        weighted = []
        for adapter, terms in forward.terms.items():
            config = self.configs[adapter]
            assert config.num_observations is not None
            assert config.kl_weight is not None  # set_by_layers has filled it in
            assert config.local_kl_weight is not None
            for kl, weight in (
                (terms.kl_global, config.kl_weight / config.num_observations),
                (terms.kl_local, config.local_kl_weight),
            ):
                if kl is not None:
                    weighted.append(self._part(adapter) * weight * kl)
        return sum(weighted[1:], weighted[0]) if weighted else None

    def _part(self, adapter: str) -> float:
        """The factor on both KL weights now, in [0, 1]."""
        schedule = self.schedules.get(adapter)
        return self.ramp(self.configs[adapter]) * (schedule.part if schedule else 1.0)

    def observe_loss(self, forward: ForwardPass, loss: Tensor) -> None:
        """Tells the schedules of the adapters in a training pass its data loss."""
        for schedule in (self.schedules.get(adapter) for adapter in forward.terms):
            if schedule is not None:
                schedule.observe(float(loss.detach()))

    def ramp(self, config: BayesianConfig) -> float:
        """The warm-up's factor on both KL weights, in [0, 1]."""
        if config.warmup == 0:
            return 1.0
        if self.progress is None:
            if not self._warned_of_progress:
                self._warned_of_progress = True
                warnings.warn(
                    "The KL's warm-up does not know how far training is, so the KL has its full "
                    "weight from the first step. Call bara.set_progress(model, step / steps, "
                    "steps) in every step (bara.BayesianCallback does), or configure warmup=0.",
                    stacklevel=2,
                )
            return 1.0
        # Adam takes full steps along even the smallest KL gradient while B is still near zero, so
        # a weight that starts to rise at once would close the gates before the data has a say.
        return rise(self.progress / config.warmup, HOLD, 1)

    def require_observations(self, adapter: str) -> None:
        """Raises BaraError if the adapter is about to train without N."""
        if self.configs[adapter].num_observations is None:
            raise BaraError(
                f"Adapter {adapter!r} cannot train: num_observations (N, the number of training "
                "examples, or of label tokens for a language model) is not known, and without it "
                "the KL has no weight. Add bara.BayesianCallback() to the Trainer's callbacks, or "
                f"pass num_observations=... to {type(self.configs[adapter]).__name__}."
            )

    # -- nothing passes unnoticed --------------------------------------------------------------

    def _watch(self, forward: ForwardPass, outputs: Any) -> None:
        """Notes which gradients arrive, and gives the pass back to layers recomputed for it."""
        reached, recomputation = forward.reached, forward.for_recomputation()
        without_kl = forward.trainable and not forward.asked

        def kl_reached(_: Tensor) -> None:
            reached.kl = True

        def data_reached(_: Tensor) -> None:
            self.forward = recomputation
            if without_kl and not reached.data:
                warnings.warn(
                    "Gradients reached a Bayesian adapter in a pass without KL, because the model "
                    "or a part of it was in evaluation mode: it trains as plain LoRA does. Call "
                    "model.train() before training.",
                    stacklevel=2,
                )
            reached.data = True

        if forward.kl is not None and forward.kl.requires_grad:
            forward.kl.register_hook(kl_reached)
        for tensor in _tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(data_reached)

    def _check_consumed(self) -> None:
        last, self.last = self.last, None
        if last is None or not last.terms:
            return
        if last.reached.data and not last.reached.kl:
            warnings.warn(
                "The last training step differentiated the model's outputs but not its KL: it "
                "trained without the prior, as plain LoRA does. Use the model's own outputs.loss, "
                "or add bara.kl_loss(model) to your loss.",
                stacklevel=2,
            )

    def kl_loss(self, data_loss: Tensor | None = None) -> Tensor:
        """See `bara.kl_loss`."""
        last = self.last
        if last is None or not last.terms:
            raise BaraError(
                "There is no KL to add: call kl_loss after a forward pass in train mode (with "
                "gradients and an active Bayesian adapter), once per pass."
            )
        if last.kl_in_loss:
            raise BaraError(
                "The KL of this step is already in outputs.loss, because labels were given to the "
                "model. Use outputs.loss, or do not pass labels and add kl_loss to your own loss."
            )
        if data_loss is not None:
            self.observe_loss(last, data_loss)
        elif any(adapter in self.schedules for adapter in last.terms):
            raise BaraError(
                "An adapter with `explained` follows the data loss: give it, as in loss + "
                "bara.kl_loss(model, data_loss=loss)."
            )
        assert last.kl is not None
        return last.kl

    def _complete(self, outputs: Any, forward: ForwardPass, has_labels: bool) -> Any:
        """The outputs with their loss completed to the ELBO, if they have a loss."""

        def elbo(loss: Tensor) -> Tensor:
            if forward.kl is not None:
                self.observe_loss(forward, loss)
                forward.kl_in_loss = True
                loss = loss + forward.kl.to(loss.device)
                forward.release()
            return forward.share * loss

        if isinstance(outputs, tuple):
            first = outputs[0] if outputs else None
            if not (has_labels and isinstance(first, Tensor) and first.dim() == 0):
                return outputs
            completed = (elbo(first), *outputs[1:])
            return type(outputs)(*completed) if hasattr(outputs, "_fields") else completed
        if isinstance(outputs, Mapping):
            if isinstance(outputs.get("loss"), Tensor):
                outputs["loss"] = elbo(outputs["loss"])  # type: ignore[index]
        elif isinstance(getattr(outputs, "loss", None), Tensor):
            outputs.loss = elbo(outputs.loss)
        return outputs


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    elif not isinstance(outputs, (tuple, list)):
        outputs = vars(outputs).values() if hasattr(outputs, "__dict__") else ()
    return [value for value in outputs if isinstance(value, Tensor)]


def adapted_root(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of PEFT and accelerate."""
    return next(module for module in model.modules() if "bara_elbo" in module.__dict__)


def elbo_of(model: nn.Module) -> Elbo:
    elbo = Elbo.of(model)
    if elbo is None:
        raise BaraError(
            "This model has no Bayesian adapter. Make one with peft.get_peft_model(model, "
            "bara.BaraConfig(...))."
        )
    return elbo
