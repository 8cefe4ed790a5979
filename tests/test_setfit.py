"""SetFit's weights in this library's model predict what SetFit predicts."""

import re

import pytest
import torch
from datasets import ClassLabel

import bara
from bara.errors import BaraError
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.recipe import TrainRecipe
from bara.methods.setfit import SetfitOptions
from test_methods import TABLE, base_dir  # noqa: F401  (a fixture)

setfit = pytest.importorskip("setfit")


def recipe_for(model, output, **options):
    options = {"num_iterations": 1, "max_steps": 3} | options
    return TrainRecipe(
        model=str(model),
        output=str(output),
        method="setfit",
        method_options=options,
        training={"use_cpu": True},
    )


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_predictions_are_those_of_the_package(
    base_dir,  # noqa: F811
    tmp_path,
    monkeypatch,
    normalised,
    classes,
):
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(str(base_dir))
    parts = [transformer, models.Pooling(32, pooling_mode="mean")]
    SentenceTransformer(modules=parts + [models.Normalize()] * normalised, device="cpu").save(
        str(tmp_path / "base")
    )
    kept = []
    monkeypatch.setattr(setfit.Trainer, "train", _keeping(setfit.Trainer.train, kept))
    labels = [i % classes for i in range(len(TABLE))]
    table = TABLE.remove_columns("label").add_column("label", labels)
    finetune(recipe_for(tmp_path / "base", tmp_path / "out"), table)
    model, tokenizer, task = load_adapter(tmp_path / "out")
    predicted = bara.predict(model, task.inputs(table, tokenizer))
    expected = kept[0].predict_proba(table["text"], as_numpy=True)
    torch.testing.assert_close(
        predicted.probs, torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-4
    )
    assert predicted.probs.std(0).min() > 1e-4


def _keeping(train, kept):
    def keep(self, *args, **kwargs):
        train(self, *args, **kwargs)
        kept.append(self.model)

    return keep


def test_the_training_tells_the_time_left(base_dir, tmp_path, terminal):  # noqa: F811
    from sentence_transformers import SentenceTransformer, models

    parts = [models.Transformer(str(base_dir)), models.Pooling(32, pooling_mode="mean")]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "base"))
    finetune(recipe_for(tmp_path / "base", tmp_path / "out"), TABLE)
    assert re.search(r"training: 100%.* 3/3 \[00:\d\d<00:00", terminal())


def test_refusals(base_dir, tmp_path):  # noqa: F811
    with pytest.raises(BaraError, match="sampling_strategy must be one of oversampling"):
        SetfitOptions(sampling_strategy="all")
    with pytest.raises(BaraError, match="at least 1, and learning_rate > 0"):
        SetfitOptions(num_iterations=-1)
    three = TABLE.cast_column("label", ClassLabel(names=["bad", "good", "great"]))
    with pytest.raises(BaraError, match="the class 'great' has no text"):
        finetune(recipe_for(base_dir, tmp_path / "a"), three)
    pairs = TABLE.add_column("text_pair", TABLE["text"])
    with pytest.raises(BaraError, match="reads single texts"):
        finetune(recipe_for(base_dir, tmp_path / "b"), pairs)
