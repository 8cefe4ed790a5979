"""A service has threads: what one of them predicts does not depend on the others."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bara
from bara.draws.draws import attach_draws
from bara.methods.weight_draws import Factors, WeightDraws
from helpers import adapt, stir, tiny_llama
from language_models import adapted_lm, word_tokenizer

THREADS, CALLS = 8, 100


@pytest.fixture(autouse=True)
def _one_core():
    """The threads under test are the tests' own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_threads(call):
    """What `call(i)` gives for every i, in threads that start together."""
    barrier = threading.Barrier(THREADS)

    def some(thread):
        barrier.wait()
        return [(i, call(i)) for i in range(thread, CALLS, THREADS)]

    with ThreadPoolExecutor(THREADS) as pool:
        results = dict(pair for part in pool.map(some, range(THREADS)) for pair in part)
    return [results[i] for i in range(CALLS)]


def batches():
    generator = torch.Generator().manual_seed(0)
    for i in range(CALLS):
        rows, length = 1 + i % 3, 4 + i % 5
        ids = torch.randint(5, 20, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - i % 3 :] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def require_equal(actual, expected):
    assert len(actual) == len(expected) == CALLS
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["bara", "balora", "blob", "scalabl", "mc-dropout"])
@pytest.mark.parametrize("training", [False, True])
def test_threads_predict_as_one_does(method, training, tiny_bert):
    options = {"granularity": "sequence"} if method == "bara" else {}
    model = stir(adapt(tiny_bert, method, task_type="SEQ_CLS", **options)).train(training)
    inputs = list(batches())

    def call(i):
        drawn = bara.predict(
            model, inputs[i], num_draws=1 + i % 4, seed=i, deterministic=i % 5 == 0, progress=False
        )
        return drawn.log_probs_draws

    expected = [call(i) for i in range(CALLS)]
    require_equal(in_threads(call), expected)
    assert model.training is training


def test_threads_sample_with_draws_of_their_own(tiny_bert):
    model = stir(adapt(tiny_bert, task_type="SEQ_CLS")).eval()
    inputs = list(batches())

    def call(i):
        with torch.no_grad(), bara.sampling(model, seed=i):
            return model(**inputs[i]).logits

    require_equal(in_threads(call), [call(i) for i in range(CALLS)])


def test_draws_of_whole_weights_take_turns(tiny_bert):
    model = stir(adapt(tiny_bert, task_type="SEQ_CLS", local_gate=False)).eval().merge_and_unload()
    names = [n for n, p in model.named_parameters() if "query.weight" in n]
    parameters = dict(model.named_parameters())
    factors = {n: Factors(torch.full_like(parameters[n], 0.3)) for n in names}
    attach_draws(model, WeightDraws(model, factors))
    inputs = list(batches())

    def call(i):
        drawn = bara.predict(model, inputs[i], num_draws=2, seed=i, progress=False)
        return drawn.log_probs_draws

    require_equal(in_threads(call), [call(i) for i in range(CALLS)])


def test_ranks_while_others_predict(tiny_bert):
    model = stir(adapt(tiny_bert, task_type="SEQ_CLS")).eval()
    inputs = list(batches())

    def call(i):
        if i % 2:
            return bara.predict(model, inputs[i], num_draws=2, seed=i, progress=False).probs
        return bara.effective_rank(model, inputs[i], num_draws=2, seed=i, progress=False).soft

    require_equal(in_threads(call), [call(i) for i in range(CALLS)])


def test_threads_generate_and_answer_as_one_does():
    model, tokenizer = adapted_lm(), word_tokenizer()
    question = {"question": "w4 w5", "choices": ["w6", "w7 w8"]}

    def call(i):
        if i % 3 == 0:
            (answer,) = bara.generate(
                model, tokenizer, f"w{3 + i % 20} w9", num_draws=2, seed=i, max_new_tokens=3
            )
            return answer.token_log_probs
        if i % 3 == 1:
            answers = bara.multiple_choice(model, tokenizer, [question], num_draws=2, seed=i)
            return answers.log_probs_draws
        with torch.no_grad(), bara.sampling(model, seed=i):
            return model(input_ids=torch.tensor([[4, 5, 6]])).logits

    require_equal(in_threads(call), [call(i) for i in range(CALLS)])


def test_an_open_stream_is_not_waited_for():
    model, tokenizer = adapted_lm(), word_tokenizer()
    stream = bara.generate_stream(model, tokenizer, "w4 w5", num_draws=2, max_new_tokens=20)
    next(stream)
    with pytest.raises(bara.BaraError, match="stream of this model's tokens is open"):
        bara.generate(model, tokenizer, "w4", num_draws=2, max_new_tokens=2)
    stream.close()
    assert bara.generate(model, tokenizer, "w4", num_draws=2, max_new_tokens=2)


def test_training_in_one_thread_while_another_draws():
    """A draw in force elsewhere does not reach a training step."""
    ids = torch.arange(12).reshape(2, 6) + 1
    losses = []
    for drawing in (False, True):
        model = stir(adapt(tiny_llama(), task_type="CAUSAL_LM", warmup=0.0)).train()
        inside, done = threading.Event(), threading.Event()

        def hold(model=model, inside=inside, done=done):
            with bara.sampling(model, seed=3):
                inside.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        if drawing:
            thread.start()
            inside.wait(10)
        torch.manual_seed(0)
        losses.append(model(input_ids=ids, labels=ids).loss.detach())
        done.set()
        if drawing:
            thread.join()
    assert torch.equal(*losses)
