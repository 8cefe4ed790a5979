"""A language model that chooses among answers, trained as `bara train` trains it.

python examples/multiple_choice.py --model tiny/decoder --data tiny/questions.jsonl
"""

import argparse

from datasets import load_dataset

import bara
from bara.evaluation.metrics import measure
from bara.finetuning.finetune import finetune
from bara.methods.recipe import TrainRecipe

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="a causal language model: folder or hub name")
parser.add_argument("--data", required=True, help="JSONL with `question`, `choices` and `answer`")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output", default="chooser")
options = parser.parse_args()

table = load_dataset("json", data_files=options.data, split="train")
parts = table.train_test_split(0.25, seed=0)
recipe = TrainRecipe(
    model=options.model,
    task="multiple-choice",
    method="bara",
    output=options.output,
    training={"num_train_epochs": options.epochs, "learning_rate": 1e-3},
)
folder = finetune(recipe, parts["train"], overwrite=True)

model, tokenizer, task = bara.load_adapter(folder)
questions = list(parts["test"])
predictive = bara.multiple_choice(model, tokenizer, questions, scoring=task.scoring, num_draws=10)
print(measure(predictive))
for question, record in zip(questions[:3], predictive.to_records(), strict=False):
    print(question["question"], question["choices"], record)
