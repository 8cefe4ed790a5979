"""A classifier behind an API: trained, calibrated, served on this machine, asked, and stopped.

Needs `pip install "bara-peft[serve]"`.

python examples/serving.py --model tiny/encoder --data tiny/reviews.jsonl
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from urllib.request import Request, urlopen

from datasets import load_dataset

from bara.cli import main

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="an encoder: folder or hub name")
parser.add_argument("--data", required=True, help="JSONL with `text` and `label`")
parser.add_argument("--epochs", default="10")
parser.add_argument("--risk", default="0.2", help="share of wrong answers to live with")
parser.add_argument("--output", default="served")
options = parser.parse_args()

parts = load_dataset("json", data_files=options.data, split="train").train_test_split(0.5, seed=0)
for name, part in parts.items():
    part.to_json(f"{options.output}-{name}.jsonl")
train = ["train", "--model", options.model, "--data", f"{options.output}-train.jsonl"]
train += ["--output", options.output, "--epochs", options.epochs, "--overwrite"]
evaluate = ["evaluate", options.output, "--data", f"{options.output}-test.jsonl"]
for command in (train, [*evaluate, "--calibrate-risk", options.risk]):  # `bara train ...`
    if code := main(command):
        sys.exit(code)

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
command = [sys.executable, "-m", "bara", "serve", options.output, "--port", str(port)]
server = subprocess.Popen(command)
try:
    while server.poll() is None:
        try:
            urlopen(f"{url}/healthz")
            break
        except OSError:  # it does not listen yet
            time.sleep(0.2)
    texts = parts["test"]["text"][:3]
    body = json.dumps({"texts": texts, "abstain_at_risk": float(options.risk)}).encode()
    request = Request(f"{url}/v1/predict", body, {"Content-Type": "application/json"})
    for text, record in zip(texts, json.load(urlopen(request))["predictions"], strict=True):
        said = "abstains" if record["abstained"] else record["prediction"]
        print(f"{text} -> {said}, epistemic {record['epistemic']:.4f} nats")
finally:
    server.terminate()
    server.wait()
