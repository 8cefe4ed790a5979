"""A tiny image classifier, and folders of plain images in two colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 16
COLOURS = {"blue": (20, 40, 200), "red": (200, 40, 20)}


def tiny_vit(num_labels: int = 2) -> ViTForImageClassification:
    """4 patches, 2 layers of width 32; its weights are always the same."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
        num_labels=num_labels,
    )
    return ViTForImageClassification(config)


def tiny_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def save_tiny_vit(folder: Path, num_labels: int = 2) -> Path:
    """A folder with the model and its processor."""
    tiny_vit(num_labels).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def write_images(folder: Path, per_class: int = 6, classes: bool = True, seed: int = 0) -> Path:
    """Noisy pictures of one colour each, of unequal sizes, in a folder for each class."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        target = folder / name if classes else folder
        target.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            height, width = random.integers(SIDE, 2 * SIDE, size=2)
            noise = random.integers(-20, 20, size=(height, width, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(target / f"{name}-{number}.png")
    return folder
