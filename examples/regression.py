"""Regression with learned noise: a mean and a variance for every text, and intervals.

python examples/regression.py --model tiny/encoder --data tiny/stars.jsonl --target stars
"""

import argparse

import numpy as np
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
parser.add_argument("--data", required=True, help="JSONL with `text` and the target")
parser.add_argument("--target", required=True, help="the column with the numbers")
parser.add_argument("--epochs", type=float, default=10)
options = parser.parse_args()
tokenizer = AutoTokenizer.from_pretrained(options.model)
table = load_dataset("json", data_files=options.data, split="train")
parts = table.train_test_split(0.25, seed=0)
mean, std = np.mean(parts["train"][options.target]), np.std(parts["train"][options.target])


def encode(row):  # the target standardised
    return {**tokenizer(row["text"], truncation=True), "labels": (row[options.target] - mean) / std}


parts = parts.map(encode, remove_columns=table.column_names)

base = AutoModelForSequenceClassification.from_pretrained(
    options.model,
    num_labels=2,
    problem_type="regression",  # mean and log-variance
)
base.config.target_mean, base.config.target_std = float(mean), float(std)  # for bara.predict
config = bara.BaraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
model = get_peft_model(base, config)

settings = {"num_train_epochs": options.epochs, "learning_rate": 1e-3, "report_to": "none"}
Trainer(
    model,
    TrainingArguments("regression", **settings),
    train_dataset=parts["train"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_loss_func=bara.elbo_loss(model, bara.gaussian_nll),
    callbacks=[bara.BayesianCallback()],
).train()

print(bara.evaluate(model, parts["test"], num_draws=10))
print(bara.predict(model, parts["test"]).interval(0.9))
