"""An image classifier from a folder with a folder of pictures for each class.

python examples/vision.py --model tiny/vision --data tiny/pictures
"""

import argparse

from peft import get_peft_model
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

import bara

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="an image model: folder or hub name")
parser.add_argument("--data", required=True, help="the folder with a folder for each class")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--output", default="vision")
options = parser.parse_args()

processor = AutoImageProcessor.from_pretrained(options.model)
images = bara.load_images(options.data, processor)
names = images.features["labels"].names
parts = images.train_test_split(0.25, seed=0)

base = AutoModelForImageClassification.from_pretrained(
    options.model,
    num_labels=len(names),
    id2label=dict(enumerate(names)),
    ignore_mismatched_sizes=True,
)
layers = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}  # of ViT
model = get_peft_model(base, bara.BaraConfig(r=8, **layers))

Trainer(
    model,
    TrainingArguments(
        options.output,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        remove_unused_columns=False,  # pictures are read from a column when their turn comes
        report_to="none",
    ),
    train_dataset=parts["train"],
    callbacks=[bara.BayesianCallback()],
).train()
model.save_pretrained(options.output)

evaluation = bara.evaluate(model, parts["test"], num_draws=10)
print(evaluation)
for record in evaluation.predictive.to_records()[:3]:
    print(record)
