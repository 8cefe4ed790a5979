"""The README's Python runs as it stands."""

import re
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainingArguments

import bara

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_runs(tiny_bert, tmp_path, capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert code is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (8, 6), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    table = Dataset.from_dict({**columns, "labels": [0, 1, 2, 0, 1, 2, 0, 1]})
    names = {
        "base_model": tiny_bert,
        "arguments": TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True
        ),
        "train": table,
        "test": table,
        "other_texts": table.remove_columns("labels"),
    }
    exec(code.group(1), names)
    assert isinstance(names["predictive"], bara.ClassificationPredictive)
    assert names["model"].peft_config["default"].resolved.num_observations == 8
    printed = capsys.readouterr().out
    assert "nll" in printed.lower()
    assert "effective rank s_bar" in printed
