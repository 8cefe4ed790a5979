"""Tiny models with random weights, and a table for each, so that every example runs offline in
seconds: python examples/tiny.py makes the folder `tiny`. Their answers mean nothing."""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

FOODS, JUDGEMENTS = (
    ["soup", "bread", "tea", "cake", "rice", "fish"],
    ["good", "great", "fine", "bad", "awful", "cold"],
)
GOOD = JUDGEMENTS[:3]
WORDS = f"<pad> <s> </s> <unk> the is was what why it food . Question: Answer: {' '.join(FOODS)}"
VOCABULARY = f"{WORDS} {' '.join(JUDGEMENTS)}".split()
CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }} Answer: {% else %}"
    "{% generation %}{{ m.content + ' </s> ' }}{% endgeneration %}{% endif %}{% endfor %}"
)
COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "eos_token_id": 2}
WIDTH = {"hidden_size": 32, "intermediate_size": 48}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGURATIONS = {
    "encoder": tf.BertConfig(**COMMON, **WIDTH, **LAYERS),
    "decoder": tf.LlamaConfig(**COMMON, **WIDTH, **LAYERS, bos_token_id=1),
    "seq2seq": tf.T5Config(**COMMON, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "vision": tf.ViTConfig(**WIDTH, **LAYERS, image_size=16, patch_size=8),
}
CLASSES = {
    "encoder": tf.AutoModel,
    "decoder": tf.AutoModelForCausalLM,
    "seq2seq": tf.AutoModelForSeq2SeqLM,
    "vision": tf.AutoModelForImageClassification,
}


def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = tf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)
    made.chat_template = CHAT
    return made


def save_models(folder):
    for name, configuration in CONFIGURATIONS.items():
        torch.manual_seed(0)
        configuration.decoder_start_token_id = 0
        CLASSES[name].from_config(configuration).save_pretrained(folder / name)
        if name == "vision":
            ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / name)
            continue
        made = tokenizer()
        if name == "seq2seq":  # whose tokeniser ends every text
            ending = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
            made.backend_tokenizer.post_processor = ending
        made.save_pretrained(folder / name)


def save_tables(folder):
    pairs = list(product(FOODS, JUDGEMENTS))
    reviews = [
        {"text": f"the {food} was {word} .", "label": "good" if word in GOOD else "bad"}
        for food, word in pairs
    ]
    tables = {
        "reviews": reviews,
        "stars": [
            {"text": row["text"], "stars": 1 + 0.7 * (5 - number % 6)}
            for number, row in enumerate(reviews)
        ],
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": f"what was {word} ?"},
                    {"role": "assistant", "content": f"the {food} ."},
                ]
            }
            for food, word in pairs
        ],
        "questions": [
            {"question": f"what is {word}", "choices": [food, word], "answer": 1}
            for food, word in pairs
        ],
        "pairs": [
            {"prompt": f"the {food} was {word}", "completion": f"{word} {food}"}
            for food, word in pairs
        ],
    }
    for name, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")


def save_pictures(folder):
    noise = np.random.default_rng(0)
    for name, colour in {"blue": (20, 40, 200), "red": (200, 40, 20)}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(12):
            pixels = np.array(colour) + noise.integers(-20, 21, size=(24, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(
                folder / name / f"{number}.png"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("tiny"))
    folder = parser.parse_args().output
    save_models(folder)
    save_tables(folder)
    save_pictures(folder / "pictures")
    print(f"{folder} has the models {', '.join(CLASSES)} and a table for each example.")
