"""A model with an encoder (T5, BART, ...) from pairs of texts, and answers with an uncertainty.

python examples/seq2seq.py --model tiny/seq2seq --data tiny/pairs.jsonl --modules q v
"""

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import bara

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="folder or hub name")
parser.add_argument("--data", required=True, help="JSONL with `prompt` and `completion`")
parser.add_argument("--modules", nargs="+", default=["q_proj", "v_proj"], help="for T5: q v")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output", default="seq2seq")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
table = load_dataset("json", data_files=options.data, split="train")
parts = table.train_test_split(0.25, seed=0)
train = parts["train"].map(
    lambda row: tokenizer(row["prompt"], text_target=row["completion"], truncation=True),
    remove_columns=table.column_names,
)

config = bara.BaraConfig(r=8, target_modules=options.modules, task_type="SEQ_2_SEQ_LM")
model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(options.model), config)
Trainer(
    model,
    TrainingArguments(
        options.output, num_train_epochs=options.epochs, learning_rate=1e-3, report_to="none"
    ),
    train_dataset=train,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[bara.BayesianCallback()],
).train()
model.save_pretrained(options.output)

prompts = parts["test"]["prompt"][:3]
for answer in bara.generate(model, tokenizer, prompts, num_draws=8, max_new_tokens=20):
    print(f"{answer.prompt} -> {answer.text}")
    print(f"uncertainty {answer.uncertainty:.2f}, agreement of the draws {answer.agreement:.2f}")
