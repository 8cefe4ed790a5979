"""Python lines that load a saved adapter, for its card: what the folder tells decides them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bara.cards.adapter_files import read_shapes
from bara.errors import BaraError
from bara.machine import gguf_stays_packed

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
WITH_LABELS = ("SEQ_CLS", "TOKEN_CLS")
"""Tasks whose base model is made for a number of labels."""

HEAD = re.compile(
    r"base_model\.model\.(score|logits_proj|(?:classifier|classification_head)(?:\.out_proj)?)"
    r"\.(?:mean_)?weight"
)
"""The last layer of the heads of transformers' classifiers; `mean_` of those with a posterior."""
FACTORS = re.compile(r"\.lora_(embedding_)?A(\.weight)?$")
SENTENCE_PREFIX = "base_model.model.encoder."
"""Of `SentenceClassifier`; no sequence classifier of transformers names its parts like this."""

SENTENCE_CLASS = """

class SentenceClassifier(nn.Module):  # its parts have the names that the adapter's tensors have
    def __init__(self, name, num_labels):
        super().__init__()
        self.encoder = AutoModel.from_pretrained(name)
        self.encoder.pooler = None  # was not there in training
        self.config = self.encoder.config
        self.classifier = nn.Linear(self.config.hidden_size, num_labels, dtype=self.encoder.dtype)

    def forward(self, input_ids, attention_mask, token_type_ids=None, **kwargs):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids, attention_mask, **types).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return SequenceClassifierOutput(logits=logits)

"""

LOADING = """```python
{imports}
{before}
base = {base}
model = PeftModel.from_pretrained(base, "{folder}").eval()
tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
missing = tensors.keys() - load_peft_weights("{folder}").keys()
assert not missing, f"the adapter was trained on another base model: {{sorted(missing)}}"
{after}```
"""
ONE_DRAW = """with bara.sampling(model, num_draws=1, seed=0):
    logits = model(**inputs).logits  # of one draw; outside, of the posterior mean
"""
USE = {
    "SEQ_CLS": "predictive = bara.predict(model, data, num_draws=10, seed=0)\n",
    "CAUSAL_LM": ONE_DRAW,
    "SEQ_2_SEQ_LM": ONE_DRAW,
}
PEFT_IMPORT = "from peft import PeftModel, get_peft_model_state_dict, load_peft_weights"


@dataclass(frozen=True)
class SavedAdapter:
    """What the tensors in an adapter's folder tell.

    Attributes:
        sentence: they are those of a `SentenceClassifier`.
        head: name of the classifier's last layer.
        num_labels: its outputs; None if there is no such layer.
        ranks: number of factors of each layer; empty if there are no weights in the folder.
    """

    sentence: bool = False
    head: str | None = None
    num_labels: int | None = None
    ranks: tuple[int, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> SavedAdapter:
        """Reads names and shapes; a folder without readable weights tells nothing."""
        try:
            shapes = read_shapes(folder)
        except BaraError:
            return cls()
        heads = [name for name in shapes if HEAD.fullmatch(name)]
        found = HEAD.fullmatch(heads[0]) if heads else None
        return cls(
            sentence=any(name.startswith(SENTENCE_PREFIX) for name in shapes),
            head=found and found[1],
            num_labels=shapes[heads[0]][0] if heads else None,
            ranks=tuple(shape[0] for name, shape in shapes.items() if FACTORS.search(name)),
        )


def loading_code(
    config: Any, saved: SavedAdapter, folder: str, *, library: Literal["bara", "peft"]
) -> str:
    """A fenced block of Python that makes the base model, loads the adapter and checks its keys.

    Args:
        config: the adapter's `LoraConfig`.
        saved: what its folder tells.
        folder: where the code looks for the adapter.
        library: `bara` for the Bayesian adapter, `peft` for a plain one.
    """
    task = task_type(config)
    name = str(config.base_model_name_or_path or "BASE MODEL")
    labels = f"num_labels={saved.num_labels or 'NUM_LABELS'}"
    imports, before, after = [PEFT_IMPORT], "", ""
    if task == "SEQ_CLS" and saved.sentence:
        if library == "bara":
            imports.append("from bara import SentenceClassifier")
            base = f"SentenceClassifier.from_encoder({json.dumps(name)}, {labels})"
        else:
            imports += [
                "from torch import nn",
                "from transformers import AutoModel",
                "from transformers.modeling_outputs import SequenceClassifierOutput",
            ]
            before = SENTENCE_CLASS
            base = f"SentenceClassifier({json.dumps(name)}, {labels})"
    else:
        auto_class = AUTO_CLASSES.get(str(task), "AutoModel")
        options = _source(name, imports, auto_class)
        if task in WITH_LABELS:
            options += f", {labels}, ignore_mismatched_sizes=True"
            if saved.num_labels is None:
                before = (
                    "NUM_LABELS = ...  # as in training: the tensors in this folder do not tell\n"
                )
        elif task not in AUTO_CLASSES:
            before = "# The adapter names no task: put the class it was trained on for AutoModel.\n"
        if "," in options:  # too long for one line
            options = f"\n    {options}\n"
        base = f"{auto_class}.from_pretrained({options})"
    if saved.head == "score":
        after = "# for batches: base.config.pad_token_id = tokenizer.pad_token_id\n"
    if library == "bara":
        imports.insert(0, "import bara")
        after += USE.get(str(task), USE["SEQ_CLS"])
    return LOADING.format(
        imports="\n".join(imports), before=before, base=base, folder=folder, after=after
    )


def task_type(config: Any) -> str | None:
    """PEFT's name of the task, however it was given."""
    name: str | None = getattr(config.task_type, "value", config.task_type)
    return name


def _source(name: str, imports: list[str], auto_class: str) -> str:
    """The arguments that name a base model; adds the import of what loads it."""
    if not name.lower().endswith(".gguf"):
        imports.append(f"from transformers import {auto_class}")
        return json.dumps(name)
    file = Path(name)
    found = f"{json.dumps(str(file.parent))}, gguf_file={json.dumps(file.name)}"
    if not gguf_stays_packed():
        imports.append(f"from transformers import {auto_class}")
        return found
    imports.append(f"from transformers import {auto_class}, GgufConfig")
    return f"{found}, quantization_config=GgufConfig(dequantize=True)"
