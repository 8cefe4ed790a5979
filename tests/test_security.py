"""What SECURITY.md promises: files that would run code when read, and sources that would let them.

Whatever runs leaves a mark: a file in the test's folder.
"""

import ast
import json
import os
import pickle
import re

import pytest
from datasets import Dataset
from transformers import dynamic_module_utils

from bara.data.tables import load_table
from bara.data.text_task import TextTask
from bara.errors import BaraError
from bara.finetuning.finetune import finetune
from bara.finetuning.load import TRUST, load_adapter
from bara.language.tasks import LanguageTask
from bara.methods.recipe import TrainRecipe
from bara.models.base import load_base
from test_architecture import FILES, ROOT

TABLE = Dataset.from_dict({"text": ["good film", "bad film"] * 4, "label": ["yes", "no"] * 4})


class Code:
    """A pickle of it makes the folder `mark` when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """Where code leaves its mark; it must not be there at the end."""
    path = tmp_path / "code-was-run"
    yield path
    assert not path.exists()


@pytest.fixture
def hostile(mark):
    """A pickle that runs code; that it does is checked once."""
    content = pickle.dumps(Code(mark))
    pickle.loads(content)
    mark.rmdir()
    return content


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    """The folder of a trained adapter."""

    def train(method, **options):
        recipe = TrainRecipe(
            model=str(tiny_model_dir),
            output=str(tmp_path / "adapter"),
            method=method,
            method_options=options,
            training={"max_steps": 1, "save_strategy": "no", "use_cpu": True},
        )
        return finetune(recipe, TABLE)

    return train


@pytest.mark.parametrize(
    ("method", "options", "weights", "pickled"),
    [
        ("bara", {"r": 2}, "adapter_model.safetensors", "adapter_model.bin"),
        ("full", {}, "model.safetensors", "pytorch_model.bin"),
        (
            "ensemble",
            {"r": 2, "num_members": 2},
            "member-1/adapter_model.safetensors",
            "member-1/adapter_model.bin",
        ),
        ("tfb", {"r": 2}, "weight_noise.safetensors", "weight_noise.safetensors"),
    ],
)
def test_pickled_weights_of_an_adapter_are_not_read(
    adapter, mark, hostile, method, options, weights, pickled
):
    folder = adapter(method, **options)
    load_adapter(folder)
    (folder / weights).unlink()
    (folder / pickled).write_bytes(hostile)
    with pytest.raises(BaraError, match=r"is a pickle|damaged"):
        load_adapter(folder)


def text_task():
    return TextTask.infer(TABLE)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_pickled_weights_of_a_base_model_run_nothing(tiny_model_dir, mark, hostile, task):
    (tiny_model_dir / "model.safetensors").unlink()
    (tiny_model_dir / "pytorch_model.bin").write_bytes(hostile)
    kind = text_task() if task == "classification" else LanguageTask(task)
    with pytest.raises(BaraError, match="cannot load the base model"):
        load_base(str(tiny_model_dir), kind, {})


def with_code(folder, mark):
    """Gives a model's folder Python files of its own, as models on the hub have."""
    body = f"import os\nos.mkdir({str(mark)!r})\n"
    (folder / "own.py").write_text(
        body + "from transformers import BertConfig, BertForSequenceClassification\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class Own(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    config |= {"auto_map": classes, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_s_own_code_is_run_when_asked_for_only(tiny_model_dir, tmp_path, mark, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with_code(tiny_model_dir, mark)
    with pytest.raises(BaraError, match="custom code which must be executed"):
        load_base(str(tiny_model_dir), text_task(), {})
    assert not mark.exists()
    model, _ = load_base(str(tiny_model_dir), text_task(), {"trust_remote_code": True})
    assert type(model).__name__ == "Own"
    mark.rmdir()


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"use_kernels": True},
        {"attn_implementation": "somebody/attention"},
    ],
)
def test_an_adapter_cannot_ask_for_code(adapter, mark, monkeypatch, options):
    """The recipe in its folder was written by whoever made the adapter."""
    folder = adapter("bara", r=2)
    recipe = TrainRecipe.load(folder / "recipe.yaml").with_options({"model_options": options})
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(BaraError, match=f"model_options.{next(iter(options))}.*{TRUST}=1"):
        load_adapter(folder)
    if "trust_remote_code" in options:
        monkeypatch.setenv(TRUST, "1")
        load_adapter(folder)


def test_a_data_set_s_code_is_not_run(tmp_path, mark):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    with pytest.raises(BaraError, match="hub data set"):
        load_table(str(folder))


def test_a_recipe_s_tags_are_not_followed(tmp_path, mark):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(BaraError, match=r"recipe\.yaml"):
        TrainRecipe.load(path)


def test_a_text_is_cut_at_the_length_of_the_task(tiny_tokenizer):
    table = Dataset.from_dict({"text": ["good " * 20_000, "bad"], "label": ["yes", "no"]})
    task = TextTask.infer(table, max_length=16)
    assert [len(ids) for ids in task.inputs(table, tiny_tokenizer)["input_ids"]] == [16, 3]


FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("pickle.load", "pickle.loads", "joblib.load", "np.load", "torch.jit.load"),
    *("yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
}


def calls(path):
    """Name, keywords and arguments of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
            yield ast.unparse(node.func), keywords


def test_the_sources_call_nothing_that_runs_what_it_reads():
    for path in FILES.values():
        for name, keywords in calls(path):
            assert name not in FORBIDDEN, f"{path}: {name}"
            if name == "torch.load":
                assert keywords["weights_only"] == "True", path
            if name == "yaml.load":  # a SafeLoader of its own
                assert keywords["Loader"] == "_Loader", path
            if name.endswith("Environment"):
                assert keywords["autoescape"] == "True", path
            assert keywords.get("shell", "False") == "False", path


def test_the_pages_escape_whatever_they_show():
    templates = list((ROOT / "reports" / "templates").glob("*.j2"))
    assert len(templates) >= 5
    for path in templates:
        assert not re.search(r"\|\s*safe\b|autoescape", path.read_text("utf-8")), path
