"""Image classification from files: loading, prediction, and the commands on a tiny model."""

import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

import bara
from bara import BaraError
from bara.data.images import ImageTask, opened
from bara.finetuning.finetune import finetune
from bara.finetuning.load import load_adapter
from bara.methods.recipe import TrainRecipe
from conftest import write_jsonl
from helpers import stir
from images import COLOURS, SIDE, save_tiny_vit, tiny_processor, tiny_vit, write_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_vit(tmp_path_factory.mktemp("vit"), num_labels=5)


def adapted():
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    model = get_peft_model(tiny_vit(), bara.BaraConfig(r=4, num_observations=12, **options))
    return stir(model).eval()


def test_a_folder_is_read_as_its_processor_reads_each_image(pictures):
    processor = tiny_processor()
    data = bara.load_images(pictures, processor)
    assert len(data) == 12
    files = [path for name in sorted(COLOURS) for path in sorted((pictures / name).iterdir())]
    for row, path in zip(data, files, strict=True):
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(torch.as_tensor(row["pixel_values"]), pixels)
        assert pixels.shape == (3, SIDE, SIDE)
        assert row["labels"] == sorted(COLOURS).index(path.parent.name)
    assert data.features["labels"].names == ["blue", "red"]
    turned = bara.load_images(pictures, processor, label_names=["red", "blue"])
    assert [row["labels"] for row in turned] == [1] * 6 + [0] * 6


def test_folders_without_classes_and_tables(pictures, tmp_path):
    processor = tiny_processor()
    plain = write_images(tmp_path / "plain", 2, classes=False)
    assert "labels" not in bara.load_images(plain, processor)[0]
    assert "labels" not in bara.load_images(plain, processor, label_names=["a", "b"])[0]
    names = sorted(path.name for path in plain.iterdir())
    rows = [{"file": name, "kind": name.partition("-")[0]} for name in names]
    table = write_jsonl(plain / "table.jsonl", rows)  # files relative to the table
    data = bara.load_images(table, processor, label_column="kind")
    assert [row["labels"] for row in data] == [0, 0, 1, 1]
    usual = write_jsonl(
        plain / "usual.jsonl", [{"file": r["file"], "labels": r["kind"]} for r in rows]
    )
    for options in ({}, {"label_names": sorted({row["kind"] for row in rows})}):
        found = bara.load_images(usual, processor, **options)
        assert [row["labels"] for row in found] == [0, 0, 1, 1]
    open_images = [Image.open(plain / name) for name in names]  # as hub data sets have them
    parquet = tmp_path / "table.parquet"
    Dataset.from_dict({"image": open_images, "label": [0, 0, 1, 1]}).to_parquet(parquet)
    whole = bara.load_images(parquet, processor)
    for row, same in zip(data, whole, strict=True):
        assert torch.equal(row["pixel_values"], same["pixel_values"])
        assert row["labels"] == same["labels"]


def test_predictions_are_the_mixture_over_draws(pictures):
    model, processor = adapted(), tiny_processor()
    data = bara.load_images(pictures, processor)
    predictive = bara.predict(model, data, num_draws=3, batch_size=9)
    pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in data])
    with torch.no_grad():
        for draw in range(3):
            with bara.sampling(model, seed=0, first_draw=draw):
                expected = model(pixel_values=pixels).logits.log_softmax(-1)
            torch.testing.assert_close(predictive.log_probs_draws[draw], expected)
    assert predictive.labels.tolist() == [0] * 6 + [1] * 6
    metrics = bara.evaluate(model, data, num_draws=3).metrics
    right = (predictive.prediction == predictive.labels).double().mean().item()
    assert metrics["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize("method", ["full", "ensemble+temperature"])
def test_train_predict_and_evaluate_a_folder(base, pictures, tmp_path, run, method):
    out, numbers = tmp_path / "adapter", tmp_path / "numbers.json"
    train = ["train", "--model", base, "--task", "image-classification", "--data", pictures]
    train += ["--method", method, "--epochs", 15, "--learning-rate", 0.01, "--batch-size", 6]
    shown = run(*train, "--validation", pictures, "--output", out)
    assert f"bara predict {out}" in shown
    run("evaluate", out, "--data", pictures, "--json", numbers, "--num-draws", 4)
    metrics = json.loads(numbers.read_text("utf-8"))["metrics"]
    assert metrics["accuracy"] > 0.9
    model, processor, task = load_adapter(out)
    assert task == ImageTask(("blue", "red"))
    assert model.config.id2label == {0: "blue", 1: "red"}
    data = bara.load_images(pictures, processor, label_names=task.label_names)
    predictive = bara.predict(model, data, num_draws=4)
    assert bara.evaluate(model, data, num_draws=4).metrics["nll"] == pytest.approx(
        metrics["nll"], abs=1e-5
    )
    unlabelled = write_images(tmp_path / "plain", 6, classes=False)
    for source in (pictures, unlabelled):
        lines = run("predict", out, "--data", source, "--num-draws", 4).splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 12
        for i, record in enumerate(records):
            assert record["probabilities"]["red"] == pytest.approx(
                float(predictive.probs[i, 1]), abs=1e-5
            )
            assert record["image"].endswith(".png")


def test_standard_input_and_rank(base, pictures, tmp_path, run, monkeypatch):
    import io
    import sys

    out = tmp_path / "adapter"
    options = {"training": {"max_steps": 2}, "output": str(out), "task": "image-classification"}
    finetune(TrainRecipe(model=str(base), data=str(pictures), **options))
    file = next((pictures / "red").iterdir())
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"image": str(file)}) + "\n"))
    record = json.loads(run("predict", out, "--num-draws", 2))
    assert record["image"] == str(file)
    table = write_jsonl(pictures / "table.jsonl", [{"image": f"red/{file.name}", "id": 7}])
    for kept in ("id", "image"):  # which every line has anyway
        files = ["--executor", "local", "--output", tmp_path / kept, "--keep-column", kept]
        run("predict", out, "--data", table, "--num-draws", 2, *files)
        line = json.loads((tmp_path / kept / "table.jsonl").read_text("utf-8"))
        assert line == record | ({"id": 7} if kept == "id" else {})
    table.unlink()
    run("ranks", out, "--data", pictures, "--output", tmp_path / "ranks", "--num-draws", 1)
    assert file.name in (tmp_path / "ranks" / "report.html").read_text("utf-8")


def test_a_head_of_the_right_size_is_trained_too_and_comes_back(pictures, tmp_path):
    out = tmp_path / "adapter"
    recipe = TrainRecipe(
        model=str(save_tiny_vit(tmp_path / "two", num_labels=2)),
        data=str(pictures),
        task="image-classification",
        training={"max_steps": 3, "learning_rate": 0.1},
        output=str(out),
    )
    finetune(recipe)
    loaded, _, _ = load_adapter(out)
    assert loaded.peft_config["default"].modules_to_save == ["classifier"]
    head = loaded.get_base_model().classifier
    trained = head.modules_to_save["default"].weight
    assert trained.shape == (2, 32)
    assert not torch.allclose(trained, head.original_module.weight)


def test_a_network_of_convolutions_is_adapted_in_them(pictures, tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    resnet = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
    resnet.save_pretrained(tmp_path / "resnet")
    tiny_processor().save_pretrained(tmp_path / "resnet")
    recipe = TrainRecipe(
        model=str(tmp_path / "resnet"),
        data=str(pictures),
        task="image-classification",
        training={"max_steps": 1},
        output=str(tmp_path / "adapter"),
    )
    model, processor, _ = load_adapter(finetune(recipe))
    adapted = bara.effective_rank(model, bara.load_images(pictures, processor)).layers
    modules = resnet.named_modules()
    convolutions = [name for name, module in modules if isinstance(module, torch.nn.Conv2d)]
    assert sorted(adapted) == sorted(convolutions)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: folder.mkdir(), "has no images"),
        (lambda folder: (folder / "cat").mkdir(parents=True), "cat has no images"),
        (
            lambda folder: (write_images(folder), write_images(folder, 1, classes=False)),
            "both images and folders",
        ),
    ],
)
def test_folders_that_make_no_sense(tmp_path, make, match):
    make(tmp_path / "folder")
    with pytest.raises(BaraError, match=match):
        bara.load_images(tmp_path / "folder", tiny_processor())


def test_a_folder_has_no_splits(pictures):
    with pytest.raises(BaraError, match="leave out the split 'test'"):
        bara.load_images(pictures, tiny_processor(), split="test")


def test_a_photograph_is_turned_as_the_camera_noted_and_hidden_files_are_left_out(tmp_path):
    picture = Image.new("RGB", (8, 4))
    picture.putpixel((7, 0), (255, 0, 0))
    noted = Image.Exif()
    noted[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    picture.save(tmp_path / "photo.png", exif=noted)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".thumbnail.png").write_text("no image", "utf-8")
    turned = opened(str(tmp_path / "photo.png"))
    assert turned.size == (4, 8)
    assert turned.getpixel((3, 7)) == (255, 0, 0)
    assert len(bara.load_images(tmp_path, tiny_processor())) == 1


def test_tables_and_files_that_make_no_sense(base, pictures, tmp_path, failing):
    processor = tiny_processor()
    for rows, match in [
        ([{"image": "no.png", "label": 0}], "row 1: there is no image file 'no.png'"),
        ([{"picture": "no.png", "label": 0}], "which column has the images"),
    ]:
        with pytest.raises(BaraError, match=match):
            bara.load_images(write_jsonl(tmp_path / "table.jsonl", rows), processor)
    (tmp_path / "text.png").write_text("no image", "utf-8")
    with pytest.raises(BaraError, match=r"text\.png is not a readable image"):
        opened(str(tmp_path / "text.png"))
    with pytest.raises(BaraError, match="labels that were not in the training data: 'blue'"):
        bara.load_images(pictures, processor, label_names=["red", "green"])
    with pytest.raises(BaraError, match="two different classes"):
        bara.load_images(pictures, processor, label_names=["red"])
    one = tmp_path / "one"
    one.mkdir()
    (pictures / "red").rename(one / "red")
    try:
        task = ["--task", "image-classification", "--output", tmp_path / "out"]
        error = failing("train", "--model", base, "--data", one, *task)
        assert "has only the class 'red'" in error
    finally:
        (one / "red").rename(pictures / "red")
