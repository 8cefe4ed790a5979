"""The KL for trainers that compute their loss themselves."""

from __future__ import annotations

from typing import Any

from bara.adapter.call_inputs import share_of
from bara.adapter.elbo import Elbo


class KLMixin:
    """Adds the KL to the loss of a `Trainer` that does not use the model's own.

    So does `Trainer` itself with `label_smoothing_factor`, and TRL's trainers compute theirs from
    the log-probabilities of the labels:

        class BayesianTrainer(bara.KLMixin, Trainer): ...
        class BayesianSFTTrainer(bara.KLMixin, SFTTrainer): ...
        class BayesianDPOTrainer(bara.KLMixin, DPOTrainer): ...

    Where the KL is in the model's loss already, nothing is added.
    """

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's loss plus `bara.kl_loss`, weighted as the trainer weighs the batch."""
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        elbo = Elbo.of(model)
        if elbo is None or not model.training or elbo.last is None or elbo.last.kl is None:
            return result
        share: Any = 1.0
        if num_items_in_batch is not None and elbo.last.items is not None:
            # the trainer adds up the batches that are accumulated, in place of averaging them
            share = share_of(elbo.last.items, num_items_in_batch)
            if self.args.average_tokens_across_devices:  # type: ignore[attr-defined]
                share = share * self.accelerator.num_processes  # type: ignore[attr-defined]
        loss = result[0] if return_outputs else result
        loss = elbo.complete(loss, elbo.last, share=share, shared=True)
        return (loss, *result[1:]) if return_outputs else loss
