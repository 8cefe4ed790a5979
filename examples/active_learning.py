"""Active learning: label first what the model would learn most from.

Needs `pip install "bara-peft[quickstart]"`. The labels of the pool are known here; with texts of
your own a person gives them at the line that says so.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

import bara
from bara.data.examples import load_sentiment, minilm_path

CLASSES = ("negative", "neutral", "positive")


def train(model_path: Path, labelled: Dataset, tokenizer: Any, epochs: int) -> Any:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=3)
    config = bara.BaraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, learning_rate=2e-3, save_strategy="no", report_to=[]
        )
        data = {"train_dataset": labelled, "processing_class": tokenizer}
        Trainer(model, arguments, callbacks=[bara.BayesianCallback()], **data).train()
    return model


def main(model_path: Path, num_pool: int, num_test: int, k: int, rounds: int, epochs: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def read(row: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenizer(row["text"], truncation=True, max_length=64)
        return {**tokens, "labels": CLASSES.index(row["label"])}

    tables = load_sentiment(num_pool, num_test, 0)
    pool, test = (t.map(read, remove_columns=t.column_names) for t in (tables.train, tables.test))
    labelled, left = list(range(k)), list(range(k, num_pool))
    for _ in range(rounds):
        model = train(model_path, pool.select(labelled), tokenizer, epochs)
        print(f"{len(labelled)} labels: accuracy {bara.evaluate(model, test).metrics['accuracy']}")
        unlabelled = pool.select(left).remove_columns("labels")
        predictive = bara.predict(model, unlabelled, num_draws=10)
        features = bara.adapter_features(model, unlabelled)
        chosen = bara.select(predictive, k, by="batch", features=features).index.tolist()
        labelled += [left[i] for i in chosen]  # here a person is asked for the labels
        left = [row for i, row in enumerate(left) if i not in set(chosen)]


if __name__ == "__main__":
    main(minilm_path(), num_pool=600, num_test=300, k=60, rounds=3, epochs=8)
