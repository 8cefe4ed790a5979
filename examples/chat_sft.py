"""A chat model with TRL's SFTTrainer, and answers that say how sure they are.

python examples/chat_sft.py --model tiny/decoder --data tiny/chats.jsonl
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import bara

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="a chat model: folder or hub name")
parser.add_argument("--data", required=True, help="JSONL with `messages`")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--output", default="chat")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
config = bara.BaraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), config)
table = load_dataset("json", data_files=options.data, split="train")

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        options.output,
        num_train_epochs=options.epochs,
        learning_rate=1e-3,
        assistant_only_loss=True,  # the chat template has to mark what the assistant says
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=table,
    processing_class=tokenizer,
    callbacks=[bara.BayesianCallback()],  # it adds the KL to the loss that TRL computes
)
trainer.train()
trainer.save_model(options.output)

question = table[0]["messages"][:1]
(answer,) = bara.generate(model, tokenizer, [question], num_draws=8, max_new_tokens=20)
print(f"{question[0]['content']} -> {answer.text}")
print(f"uncertainty {answer.uncertainty:.2f}, agreement of the draws {answer.agreement:.2f}")
for text, epistemic in zip(answer.pieces, answer.epistemic_uncertainty.tolist(), strict=True):
    print(f"{text!r}: epistemic {epistemic:.4f} nats")
