"""A classifier on top of a sentence encoder: the mean of its tokens, then a linear layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file, can_return_tuple

from bara.adapter.call_inputs import share_of
from bara.errors import BaraError

POOLING_FILE = "1_Pooling/config.json"
NORMALISE = "normalise_features"
"""Set in the configuration, the mean is divided by its length."""


class SentenceClassifier(PreTrainedModel):
    """Classification or regression on the masked mean of an encoder's last hidden states.

    This is how sentence-transformers models (MiniLM, MPNet, E5, ...) were trained to represent a
    text; `AutoModelForSequenceClassification` reads their first token instead, which they left
    untrained, and learns far less from few examples.

    Args:
        encoder: a transformers encoder; its `config.num_labels` and `problem_type` decide the head.
    """

    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    accepts_loss_kwargs = True

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__(encoder.config)
        config: Any = encoder.config
        if "pooler" in encoder._modules:
            encoder._modules["pooler"] = None  # reads the first token, and nobody would use it
        self.encoder = encoder
        self.classifier = nn.Linear(config.hidden_size, config.num_labels, dtype=encoder.dtype)
        self.loss_type = "ForSequenceClassification"
        self.post_init()  # initialises the classifier; the encoder's modules are marked as done

    @classmethod
    def from_encoder(cls, name: str, **options: Any) -> SentenceClassifier:
        """Loads the encoder of a folder or hub name and puts a new head on it.

        Args:
            name: a sentence-transformers model.
            **options: of `AutoModel.from_pretrained`, `num_labels` and `id2label` among them.

        Raises:
            BaraError: the checkpoint lacks weights of the encoder.
        """
        encoder, info = AutoModel.from_pretrained(name, output_loading_info=True, **options)
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
        if missing:
            raise BaraError(
                f"it lacks {len(missing)} of its weights (first: {missing[0]}); "
                "give a complete checkpoint"
            )
        return cls(encoder)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, num_labels), and the mean loss when labels (B,) are given.

        With `num_items_in_batch`, the labels of all accumulated micro-batches, the loss is this
        micro-batch's part of the mean over them.
        """
        if token_type_ids is not None:  # not every encoder has them
            kwargs["token_type_ids"] = token_type_ids
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden: Tensor = output.last_hidden_state
        if attention_mask is None:
            mean = hidden.mean(dim=1)
        else:
            weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)
        if getattr(self.config, NORMALISE, False):
            mean = nn.functional.normalize(mean, dim=-1)
        logits = self.classifier(mean)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            loss = loss * share_of(labels.ne(-100), num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def is_sentence_encoder(name: str) -> bool:
    """Whether a folder or hub name is a sentence-transformers model that pools by the mean.

    Raises:
        OSError, ValueError: the name does not exist, or its pooling file is damaged.
    """
    if Path(name).is_dir():
        file: str | None = str(Path(name) / POOLING_FILE)
    else:
        file = cached_file(
            name,
            POOLING_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    if file is None or not Path(file).is_file():
        return False
    pooling = json.loads(Path(file).read_text("utf-8"))
    # sentence-transformers 5 writes the second form
    return bool(pooling.get("pooling_mode_mean_tokens")) or pooling.get("pooling_mode") == "mean"


def save_sentence_transformer(model: SentenceClassifier, folder: Path) -> None:
    """Writes the model as a sentence-transformers folder whose embedding of a text is its logits.

    The encoder's own files are those of a plain transformers model. The tokeniser has to be saved
    beside them, and where texts are cut (`save_max_length`), else it is where the tokeniser says.
    """
    head = model.classifier
    model.encoder.save_pretrained(str(folder))
    pooling = {"word_embedding_dimension": head.in_features, "pooling_mode_mean_tokens": True}
    dense = {
        "in_features": head.in_features,
        "out_features": head.out_features,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    modules = []
    for number, (name, kind, config) in enumerate(
        (("", "Transformer", None), ("1_Pooling", "Pooling", pooling), ("2_Dense", "Dense", dense))
    ):
        modules.append(
            {
                "idx": number,
                "name": str(number),
                "path": name,
                "type": f"sentence_transformers.models.{kind}",
            }
        )
        if config is not None:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    weights = {f"linear.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(weights, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), "utf-8")


def save_max_length(folder: Path, max_length: int) -> None:
    """Has sentence-transformers cut the texts for a folder's model to so many tokens."""
    config = {"max_seq_length": max_length, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(config, indent=2), "utf-8")
