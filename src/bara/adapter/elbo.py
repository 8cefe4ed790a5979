"""The ELBO of one model: what its forward passes share, and the KL that joins the loss.

A root hook opens a `ForwardPass` for every call of the adapted model. The layers read from it what
they cannot see themselves (padding, draws) and hand their KL up to it; when the call ends the hook
adds the weighted KL to `outputs.loss`, so that any trainer that uses the model's own loss trains
the ELBO. Every loss, whoever computed it, becomes the ELBO in `Elbo.complete`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from bara.adapter.call_inputs import (
    batch_size_of,
    counted,
    loss_items,
    loss_terms,
    position_weights_of,
    share_of,
)
from bara.adapter.call_outputs import tensors_of, with_loss
from bara.adapter.forward_pass import ForwardPass, Observer
from bara.adapter.inspection import passed_by
from bara.draws.context import PerContext, PerThread
from bara.draws.draws import Draws, DrawSource
from bara.errors import BaraError
from bara.posteriors.config import BayesianConfig, Resolved, rise
from bara.posteriors.posterior import Posterior

HOLD = 0.4
"""Part of the warm-up during which the KL has no weight."""


@dataclass
class AttachedAdapter:
    """One Bayesian adapter of a model.

    Attributes:
        config: what the user wrote.
        resolved: the numbers in force.
        layers: PEFT's layers that it adapts and their posteriors, by name.
        reference: it stands beside the adapters that a trainer trains (TRL's `ref`), to compare
            them with: without gradients it is at its mean in training mode too.
    """

    config: BayesianConfig
    resolved: Resolved
    layers: dict[str, tuple[LoraLayer, Posterior]] = field(default_factory=dict)
    reference: bool = False


class Elbo(DrawSource):
    """What all forward passes of one adapted model share. Lives on the model as `bara_elbo`.

    Attributes:
        adapters: its Bayesian adapters by name.
        progress: how far training is, in [0, 1]; None if nobody says.
        last: the last training pass.
        fuse: prepare layers together where that can be done; False computes each on its own.
        draws: the draws in force here; None for the posterior mean.
        adapter_names: PEFT's adapters of the rows of a mixed batch that runs here.
        observers: told of every layer that runs here.
        forward: the open pass here.
    """

    batched = True
    draws = PerContext()
    adapter_names = PerContext()
    observers = PerContext()
    forward = PerThread()

    def __init__(self, model: nn.Module) -> None:
        self.adapters: dict[str, AttachedAdapter] = {}
        self.progress: float | None = None
        self.last: ForwardPass | None = None
        self.fuse = True
        self._warned_of_progress = False
        self._recomputed: dict[int, ForwardPass] = {}  # by the backward pass that needs them
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
        forward: ForwardPass | None = self.forward
        if forward is None and self._recomputed:
            return self._recomputed.get(torch._C._current_graph_task_id())
        return forward

    def in_force(self) -> bool:
        return any(
            name in layer.active_adapters and not passed_by(layer)
            for name, adapter in self.adapters.items()
            for layer, _ in adapter.layers.values()
        )

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
    def observing(self, observe: Observer) -> Iterator[None]:
        """Every adapted layer's forward pass inside calls `observe(layer, posterior, space)`, with
        autocast off."""
        before = self.observers
        self.observers = (*(before or ()), observe)
        try:
            yield
        finally:
            self.observers = before

    def detach(self, root: nn.Module) -> None:
        """Removes the state and its hooks from a model that has been unloaded."""
        for handle in self._handles:
            handle.remove()
        root.__dict__.pop("bara_elbo", None)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the model starts without the graphs of passes it has not made
        return {**self.__dict__, "last": None, "_recomputed": {}}

    # -- one forward pass ----------------------------------------------------------------------

    @torch.compiler.disable
    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        training = model.training and torch.is_grad_enabled()
        forward = ForwardPass(
            batch_size=batch_size_of(given),
            weights=tuple(position_weights_of(model, given)),
            draws=self.draws,
            adapter_names=self.adapter_names,
            training=training,
            observers=self.observers or (),
            fuse=self.fuse,
        )
        if self.fuse and forward.draws is None and model.training:
            forward.draw_seed()
        if training:
            for adapter in self.adapters.values():
                adapter.resolved.held = self._part_of_warmup(adapter.resolved) == 0
            self.check_consumed()
            if self.last is not None and self.last.awaits_loss:
                forward.before = self.last
            self.last = None
            forward.loss_terms = loss_terms(model, given)
            items = loss_items(model, given)
            if items is not None:
                forward.items = items.flatten(1).sum(1) if items.dim() > 1 else items
                # With the micro-batch's mean loss in hand one factor scales data and KL alike. Not
                # every model's loss honours num_items_in_batch, so it never sees it.
                forward.share = share_of(items, kwargs.pop("num_items_in_batch", None))
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
        forward.shared = None
        if outputs is None or not (forward.training or forward.trainable):
            return outputs
        if forward.training:
            self.last = forward
            forward.reduce()
            forward.kl = self._weighted_kl(forward)
            if not forward.terms and forward.before is not None:
                self.last = forward.before  # this one was made without the adapter
            forward.before = None
        self._watch_gradients(forward, outputs)
        self._reopen_in_backward(forward, outputs)
        forward.fused = {}  # the graph is to go when the loss goes
        if kwargs.get("fused_lm_head"):
            return outputs  # TRL's trainers use its log-probabilities, not its loss
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        return with_loss(
            outputs,
            lambda loss: self.complete(loss, forward, share=forward.share),
            has_labels=given.get("labels") is not None,
        )

    def _weighted_kl(self, forward: ForwardPass) -> Tensor | None:
        """beta_g / N KL_global + beta_l KL_local over the active adapters, in the loss's unit."""
        weighted = []
        for name, terms in forward.terms.items():
            adapter = self.adapters[name]
            resolved = adapter.resolved
            assert resolved.num_observations is not None
            for kl, weight in (
                (terms.kl_global, resolved.kl_weight / resolved.num_observations),
                (terms.kl_local, resolved.local_kl_weight),
            ):
                if kl is not None:
                    ramp = resolved.strength * self.ramp(resolved)
                    weighted.append(ramp * weight * kl)
        if not weighted:
            return None
        kl = sum(weighted[1:], weighted[0])
        return kl / forward.loss_terms if forward.loss_terms > 1 else kl

    def ramp(self, resolved: Resolved) -> float:
        """The warm-up's factor on both KL weights, in [0, 1]."""
        if self.progress is None and resolved.warmup > 0 and not self._warned_of_progress:
            self._warned_of_progress = True
            warnings.warn(
                "The KL's warm-up does not know how far training is, so the KL has its full "
                "weight from the first step. Call bara.set_progress(model, step / steps, "
                "steps) in every step (bara.BayesianCallback does), or configure warmup=0.",
                stacklevel=2,
            )
        return self._part_of_warmup(resolved)

    def _part_of_warmup(self, resolved: Resolved) -> float:
        # Adam takes full steps along even the smallest KL gradient while B is still near zero, so
        # a weight that starts to rise at once would close the gates before the data has a say.
        if resolved.warmup == 0 or self.progress is None:
            return 1.0
        return rise(self.progress / resolved.warmup, HOLD, 1)

    # -- the objective -------------------------------------------------------------------------

    def complete(
        self,
        loss: Tensor,
        forward: ForwardPass | None,
        *,
        share: Tensor | float = 1.0,
        shared: bool = False,
    ) -> Tensor:
        """The ELBO of a pass from its data loss: share * (loss + KL).

        Whoever computes a loss (the model, `elbo_loss`, a trainer of TRL) completes it here.

        Args:
            loss: mean over the labels of the micro-batch.
            forward: the pass; without a KL, or with one that is in a loss already, it adds none.
            share: part of the accumulated batch that this micro-batch is.
            shared: the loss has been multiplied by the share already.
        """
        if not shared:
            loss = counted(loss, share)
        if forward is None or forward.kl is None:
            return loss if shared else share * loss
        kl = forward.take_kl().to(loss.device)
        return loss + share * kl if shared else share * (loss + kl)

    def kl_loss(self) -> Tensor:
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
        assert last.kl is not None
        last.kl_given = True
        return last.kl

    # -- nothing passes unnoticed --------------------------------------------------------------

    def require_observations(self, name: str) -> None:
        """Raises BaraError if the adapter is about to train without N."""
        adapter = self.adapters[name]
        if adapter.resolved.num_observations is None:
            raise BaraError(
                f"Adapter {name!r} cannot train: num_observations (N, the number of training "
                "examples, or of label tokens for a language model) is not known, and without it "
                "the KL has no weight. Add bara.BayesianCallback() to the Trainer's callbacks, or "
                f"pass num_observations=... to {type(adapter.config).__name__}."
            )

    def _watch_gradients(self, forward: ForwardPass, outputs: Any) -> None:
        """Notes which gradients of the pass are computed."""
        reached, without_kl = forward.reached, forward.trainable and not forward.asked

        def kl_reached(_: Tensor) -> None:
            reached.kl = True

        def data_reached(_: Tensor) -> None:
            if without_kl and not reached.data:
                warnings.warn(
                    "Gradients reached a Bayesian adapter in a pass without KL, because the model "
                    "or a part of it was in evaluation mode: it trains as plain LoRA does. Call "
                    "model.train() before training.",
                    stacklevel=2,
                )
            reached.data = True

        if forward.kl is None or not forward.kl.requires_grad:
            reached.kl = True  # there is nothing to reach
        else:
            forward.kl.register_hook(kl_reached)
        for tensor in tensors_of(outputs):
            if tensor.requires_grad:
                tensor.register_hook(data_reached)

    def _reopen_in_backward(self, forward: ForwardPass, outputs: Any) -> None:
        """Gives the pass back to layers that gradient checkpointing recomputes.

        By the number of the backward pass, not by thread: autograd runs each device in one of its
        own.
        """
        recomputation = forward.for_recomputation()

        def reopen(_: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            if task not in self._recomputed:
                torch.autograd.Variable._execution_engine.queue_callback(partial(self._close, task))
            self._recomputed[task] = recomputation  # a later pass is differentiated first

        for tensor in tensors_of(outputs):
            if tensor.requires_grad:
                tensor.register_hook(reopen)

    def _close(self, task: int) -> None:
        self._recomputed.pop(task, None)

    def check_consumed(self) -> None:
        """Refuses to go on if the last training pass was differentiated without its KL.

        Raises:
            BaraError: it was, so that the step trained as plain LoRA.
        """
        last = self.last
        if last is not None and last.terms and last.reached.data and not last.reached.kl:
            self.last = None  # said once: what comes next may be right
            raise BaraError(
                "The last training step differentiated the model's outputs but not its KL: it "
                "trained without the prior, as plain LoRA does. Use the model's own outputs.loss, "
                "or give the model no labels and add bara.kl_loss(model) to your loss; a Trainer's "
                "own loss takes the KL from bara.BayesianCallback() or bara.KLMixin."
            )


def adapted_root(model: nn.Module) -> nn.Module:
    """The transformers model inside the wrappers of PEFT and accelerate."""
    return next(module for module in model.modules() if "bara_elbo" in module.__dict__)


def elbo_of(model: nn.Module) -> Elbo:
    """The state of an adapted model.

    Raises:
        BaraError: it has no Bayesian adapter.
    """
    elbo = Elbo.of(model)
    if elbo is None:
        raise BaraError(
            "This model has no Bayesian adapter. Make one with peft.get_peft_model(model, "
            "bara.BaraConfig(...))."
        )
    return elbo
