"""The data of suite/language-models.yaml: two tables of questions, and one that is generated.

    pip install reasoning-gym
    python benchmarks/language_tasks.py --data FOLDER --output benchmarks/language-tasks

FOLDER holds arc_easy and openbookqa. The generated task asks for the relation of two people of a
family that the question describes (reasoning-gym's `family_relationships`), among four relations.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

SIZES = {"train": 2000, "test": 500}
NUM_CHOICES = 4


def family_questions(size: int, seed: int) -> list[dict[str, object]]:
    """Questions with the relation that is right and three others, in an order by chance."""
    import reasoning_gym

    items = list(reasoning_gym.create_dataset("family_relationships", size=size, seed=seed))
    relations = sorted({item["answer"] for item in items})
    chance = random.Random(seed)
    rows: list[dict[str, object]] = []
    for item in items:
        others = chance.sample([r for r in relations if r != item["answer"]], NUM_CHOICES - 1)
        choices = chance.sample([item["answer"], *others], NUM_CHOICES)
        question = item["question"]
        rows.append(
            {"question": question, "choices": choices, "answer": choices.index(item["answer"])}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    for task in ("arc_easy", "openbookqa"):
        shutil.copytree(arguments.data / task, arguments.output / task, dirs_exist_ok=True)
    folder = arguments.output / "family"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate(SIZES.items()):
        lines = [json.dumps(row) for row in family_questions(size, seed)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
