"""A text classifier with Trainer: how good, how sure, and which texts a person should look at.

python examples/classification.py --model tiny/encoder --data tiny/reviews.jsonl
"""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import bara

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="an encoder: folder or hub name")
parser.add_argument("--data", required=True, help="JSONL with `text` and `label`")
parser.add_argument("--epochs", type=float, default=10)
parser.add_argument("--output", default="classifier")
options = parser.parse_args()

table = load_dataset("json", data_files=options.data, split="train").class_encode_column("label")
names = table.features["label"].names
tokenizer = AutoTokenizer.from_pretrained(options.model)
table = table.map(lambda row: tokenizer(row["text"], truncation=True))
parts = table.train_test_split(0.25, seed=0, stratify_by_column="label")

base = AutoModelForSequenceClassification.from_pretrained(
    options.model, num_labels=len(names), id2label=dict(enumerate(names))
)
config = bara.BaraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
model = get_peft_model(base, config)

trainer = Trainer(
    model,
    TrainingArguments(
        options.output, num_train_epochs=options.epochs, learning_rate=1e-3, report_to="none"
    ),
    train_dataset=parts["train"],
    data_collator=DataCollatorWithPadding(tokenizer),
    callbacks=[bara.BayesianCallback()],
)
trainer.train()
model.save_pretrained(options.output)

test = parts["test"].remove_columns("text")
evaluation = bara.evaluate(model, test, num_draws=10)
print(evaluation)
predictive = evaluation.predictive
for row in predictive.epistemic_uncertainty.argsort(descending=True)[:3].tolist():
    print(parts["test"]["text"][row], predictive.select([row]).to_records()[0])
