"""The model `bara` of lm-evaluation-harness, on tasks from local files."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import bara
from bara.language.likelihood import continuation_log_probs
from conftest import write_jsonl
from helpers import stir
from language_models import adapted_lm, tiny_lm, word_tokenizer, words

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from bara.lm_eval import BaraLM  # noqa: E402

TASK = """
task: tiny_arc
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROWS = [
    {"question": words(i, i + 1), "choices": [words(i + 2), words(6, 9), words(4)], "answer": i % 3}
    for i in range(10, 18)
]


def by_hand(model, before, after, num_draws, seed=0):
    """log p of each continuation under each draw, one text, draw and token at a time."""
    rows = []
    for d in range(num_draws):
        ids, total = list(before), 0.0
        for token in after:
            with torch.no_grad(), bara.sampling(model, seed=seed, first_draw=d):
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            total += logits.log_softmax(-1)[token].item()
            ids.append(token)
        rows.append(total)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("method", ["bara", "blob"])
def test_continuations_under_every_draw(method):
    model = adapted_lm("llama", method)
    pairs = [([1, 5, 9], [7]), ([1], [8, 30, 4, 11]), ([4, 4, 4, 4, 4], [12, 13])]
    log_probs, greedy = continuation_log_probs(model, pairs, num_draws=3, seed=2, batch_size=7)
    for i, (before, after) in enumerate(pairs):
        expected = by_hand(model, before, after, 3, seed=2)
        torch.testing.assert_close(log_probs[:, i].double(), expected, atol=1e-4, rtol=1e-4)
    assert greedy.dtype == torch.bool
    # what greedy decoding answers is greedy
    tokenizer = word_tokenizer()
    (answer,) = bara.generate(
        model, tokenizer, words(5, 9), num_draws=3, seed=2, max_new_tokens=3, agreement=False
    )
    before = tokenizer(words(5, 9))["input_ids"]
    own = (before, answer.tokens.tolist())
    _, greedy = continuation_log_probs(model, [own, (before, [3, 3])], num_draws=3, seed=2)
    assert greedy.tolist() == [True, False]
    with pytest.raises(bara.BaraError, match="has no tokens"):
        continuation_log_probs(model, [([], [1])])
    with pytest.raises(bara.BaraError, match="does not fit the model's context"):
        continuation_log_probs(model, [([1] * 64, [1, 1])])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a posterior, made from a plain adapter, and the harness's task beside it."""
    folder = tmp_path_factory.mktemp("lm-eval")
    base = folder / "base"
    tiny_lm("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    plain = stir(get_peft_model(tiny_lm("llama"), config), 0.3)
    plain.peft_config["default"].base_model_name_or_path = str(base)
    plain.save_pretrained(folder / "lora")
    table = write_jsonl(folder / "table.jsonl", [{"text": words(*range(5, 15))}] * 3)
    bara.bayesianize(
        folder / "lora", str(table), folder / "adapter", method_options={"tolerance": 0.5}
    )
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "task.yaml").write_text(TASK.format(rows=rows))
    return folder / "adapter"


def test_a_task_from_local_files(adapter, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    manager = TaskManager(include_path=str(adapter.parent), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model="bara",
        model_args={"adapter": str(adapter), "num_draws": 3, "seed": 1},
        tasks=["tiny_arc"],
        task_manager=manager,
        batch_size=8,
        log_samples=True,
        bootstrap_iters=0,
    )
    model, tokenizer, _ = bara.load_adapter(adapter)
    right = []
    for sample in results["samples"]["tiny_arc"]:
        row = sample["doc"]
        scores = []
        for choice, answer in zip(row["choices"], sample["filtered_resps"], strict=True):
            before = tokenizer(row["question"])["input_ids"]
            after = tokenizer(row["question"] + " " + choice)["input_ids"][len(before) :]
            draws = by_hand(model, before, after, 3, seed=1)
            expected = float(draws.logsumexp(0)) - math.log(3)
            assert answer[0] == pytest.approx(expected, abs=1e-3)
            assert draws.std() > 1e-3
            scores.append(expected)
        right.append(scores.index(max(scores)) == row["answer"])
    assert results["results"]["tiny_arc"]["acc,none"] == pytest.approx(sum(right) / len(right))


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_whole_texts_and_generation(adapter):
    lm = BaraLM(str(adapter), num_draws=2, batch_size=4)
    short, long = words(5, 6, 7), words(*[3 + i % 60 for i in range(100)])
    found = lm.loglikelihood_rolling([request("loglikelihood_rolling", t) for t in (short, long)])
    draws = by_hand(lm.model, [1], lm.tok_encode(short, add_special_tokens=False), 2)
    assert found[0] == pytest.approx(float(draws.logsumexp(0)) - math.log(2), abs=1e-3)
    ids = lm.tok_encode(long, add_special_tokens=False)  # two windows: 64 tokens, and the rest
    first = by_hand(lm.model, [1], ids[:64], 2)
    second = by_hand(lm.model, ids[35:64], ids[64:], 2)  # as much context as fits
    assert found[1] == pytest.approx(float((first + second).logsumexp(0)) - math.log(2), rel=1e-4)
    (plain,) = bara.generate(lm.model, lm.tokenizer, short, num_draws=2, max_new_tokens=5)
    stop = plain.text.split()[2]
    asked = request("generate_until", short, {"until": [stop], "max_gen_toks": 5})
    (text,) = lm.generate_until([asked])
    assert text == plain.text.split(stop)[0]


def test_arguments(adapter):
    with pytest.raises(bara.BaraError, match="there is no 'num_draw'"):
        BaraLM(str(adapter), num_draw=3)
    with pytest.raises(bara.BaraError, match="which adapter"):
        BaraLM()
    with pytest.raises(bara.BaraError, match="must be a number"):
        BaraLM(str(adapter), batch_size="auto")
