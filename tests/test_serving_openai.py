"""OpenAI's own client against `bara serve`: its answers are those of `bara.generate`."""

# ruff: noqa: E402 (what comes after importorskip needs the extra `serve`)

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

import torch

import bara
from bara.evaluation.abstention import Threshold, save_threshold
from bara.export.client import Ensemble
from bara.language import likelihood
from bara.serving import decoding
from bara.serving.app import create_app
from bara.serving.limits import Limits
from bara.serving.served import load_served
from bara.serving.stops import StopText
from language_models import words
from serving import running

MESSAGES = [{"role": "user", "content": words(4, 5)}]


@pytest.fixture(scope="module")
def served(served_folders):
    return load_served([str(served_folders[name]) for name in ("words", "reviews")])


@pytest.fixture(scope="module")
def url(served):
    limits = Limits(texts=3, tokens=30, draws=16, seconds=20)
    with running(create_app(served, limits=limits)) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(served, prompt, **options):
    (answer,) = bara.generate(
        served[0].model, served[0].tokenizer, [prompt], agreement=False, **options
    )
    return answer


def require_same(choice, answer, text=None):
    """A choice's text and numbers are those of a `bara.Generation`."""
    assert (choice.message.content if hasattr(choice, "message") else choice.text) == answer.text
    record = answer.to_record()
    told = choice.uncertainty
    for name in ("score", "total", "epistemic"):
        assert told[name] == pytest.approx(record[name], rel=1e-3, abs=1e-5)
    assert told["uncertainty"] == pytest.approx(answer.uncertainty, rel=1e-3)
    assert [t["text"] for t in told["tokens"]] == [t["text"] for t in record["tokens"]]
    for ours, theirs in zip(told["tokens"], record["tokens"], strict=True):
        for name in ("log_prob", "total", "epistemic"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5)


def test_a_chat_is_that_of_generate(client, served):
    answer = client.chat.completions.create(
        model="words",
        messages=MESSAGES,
        max_tokens=6,
        seed=3,
        logprobs=True,
        top_logprobs=4,
        extra_body={"num_draws": 5},
    )
    generation = expected(
        served, MESSAGES, max_new_tokens=6, seed=3, num_draws=5, output_logits=True
    )
    (choice,) = answer.choices
    require_same(choice, generation)
    assert choice.finish_reason in ("stop", "length")
    assert (choice.uncertainty["num_draws"], choice.uncertainty["seed"]) == (5, 3)
    assert choice.uncertainty["epistemic"] > 1e-3
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == len(generation.tokens)
    for token, log_prob, distribution in zip(
        choice.logprobs.content, generation.token_log_probs, generation.log_probs, strict=True
    ):
        assert token.logprob == pytest.approx(float(log_prob), rel=1e-3, abs=1e-5)
        best = distribution.topk(4).values.tolist()
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(best, rel=1e-3)
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert joined.decode() == choice.message.content


def test_completions_of_several_prompts(client, served):
    prompts = [words(4, 5), words(7), words(8, 9, 10)]
    answer = client.completions.create(model="words", prompt=prompts, max_tokens=5, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        generation = expected(served, prompt, max_new_tokens=5)
        require_same(choice, generation)
        log_probs = choice.logprobs
        assert log_probs.token_logprobs == pytest.approx(
            generation.token_log_probs.tolist(), rel=1e-3, abs=1e-5
        )
        assert len(log_probs.tokens) == len(generation.tokens) == len(log_probs.text_offset)
        for top, chosen in zip(log_probs.top_logprobs, log_probs.token_logprobs, strict=True):
            assert len(top) == 2
            assert max(top.values()) == pytest.approx(chosen, rel=1e-3)  # greedy


def test_the_client_of_exports_reads_it(url, served):
    answer = Ensemble(("words",), url=f"{url}/v1").ask(words(4, 5), top=20)
    generation = expected(served, words(4, 5), max_new_tokens=1, output_logits=True)
    top = generation.log_probs[0].exp().topk(20)
    assert sorted(answer.probabilities.values()) == pytest.approx(
        sorted(top.values.tolist()), rel=1e-3
    )


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_has_the_same_tokens(client, served, chat):
    options = {"model": "words", "max_tokens": 6, "stream": True}
    options["stream_options"] = {"include_usage": True}
    if chat:
        events = list(client.chat.completions.create(messages=MESSAGES, logprobs=True, **options))
        assert events[0].choices[0].delta.role == "assistant"
    else:
        events = list(client.completions.create(prompt=words(4, 5), logprobs=0, **options))
    generation = expected(served, MESSAGES if chat else words(4, 5), max_new_tokens=6)
    choices = [choice for event in events for choice in event.choices]
    pieces = [c.delta.content or "" if chat else c.text for c in choices]
    assert "".join(pieces) == generation.text
    tokens = [c for c in choices if c.finish_reason is None and getattr(c, "uncertainty", None)]
    assert [c.uncertainty["epistemic"] for c in tokens] == pytest.approx(
        generation.epistemic_uncertainty.tolist(), rel=1e-3, abs=1e-5
    )
    assert all(c.logprobs for c in tokens)
    last = choices[-1]
    assert last.finish_reason in ("stop", "length")
    assert last.uncertainty["score"] == pytest.approx(generation.score, rel=1e-3)
    assert events[-1].usage.completion_tokens == len(generation.tokens)


def test_requests_together_are_decoded_together(client, served, monkeypatch):
    """Streams and whole answers of several lengths, with stops, in one batch for each seed."""
    sizes, go, begun = [], threading.Event(), threading.Event()

    def counted(sampler, inputs, seed, take):
        sizes.append(len(inputs["input_ids"]))
        begun.set()
        assert go.wait(20)
        decode_rows(sampler, inputs, seed, take)

    decode_rows = decoding.decode_rows
    monkeypatch.setattr(decoding, "decode_rows", counted)

    def call(number):
        prompt = words(*range(4 + number, 6 + number + number % 2))
        options = {"max_tokens": 3 + number, "seed": number % 2}
        if number % 3:
            answer = client.completions.create(model="words", prompt=prompt, **options)
            return prompt, options, answer.choices[0].text
        stream = client.completions.create(model="words", prompt=prompt, stream=True, **options)
        return prompt, options, "".join(event.choices[0].text for event in stream)

    with ThreadPoolExecutor(7) as pool:
        first = pool.submit(call, 0)
        assert begun.wait(20)
        others = [pool.submit(call, number) for number in range(1, 7)]
        queued = client.with_options(timeout=20)
        while b"bara_queue_requests 6.0" not in queued._client.get("../metrics").content:
            pass
        go.set()
        answers = [future.result(30) for future in (first, *others)]
    assert sorted(sizes) == [1, 3, 3]
    for prompt, options, text in answers:
        generation = expected(
            served, prompt, max_new_tokens=options["max_tokens"], seed=options["seed"]
        )
        assert text == generation.text


def test_sampled_tokens_are_those_of_the_seed(client, served):
    def sampled(seed):
        answer = client.chat.completions.create(
            model="words", messages=MESSAGES, max_tokens=8, temperature=1.5, top_p=0.9, seed=seed
        )
        return answer.choices[0].message.content

    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 8}
    assert sampled(1) == expected(served, MESSAGES, seed=1, **options).text
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_the_mean_is_one_draw_without_disagreement(client, served):
    answer = client.completions.create(
        model="words", prompt=words(4), max_tokens=4, extra_body={"deterministic": True}
    )
    require_same(
        answer.choices[0], expected(served, words(4), max_new_tokens=4, deterministic=True)
    )
    assert answer.choices[0].uncertainty["epistemic"] == 0
    assert answer.choices[0].uncertainty["num_draws"] == 1


def read(one, text, num_draws, seed):
    """(T - 1, V) log-probabilities of the mixture at each place, draw by draw."""
    ids = one.tokenizer(text, return_tensors="pt")["input_ids"]
    draws = []
    for draw in range(num_draws):
        with torch.no_grad(), bara.sampling(one.model, seed=seed, first_draw=draw):
            draws.append(one.model(input_ids=ids).logits[0, :-1].softmax(-1))
    return ids[0].tolist(), torch.stack(draws).mean(0).log()


@pytest.mark.parametrize("most", [0, 3])
def test_the_tokens_of_a_prompt_are_scored(client, served, most):
    """vLLM's form, with the mixture's numbers; prompts of several lengths in one request."""
    prompts, draws = [words(4, 5, 60, 7), words(9, 8)], {"num_draws": 5}
    answer = client.completions.create(
        model="words",
        prompt=prompts,
        max_tokens=2,
        seed=3,
        extra_body={"prompt_logprobs": most, **draws},
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        require_same(choice, expected(served, prompt, max_new_tokens=2, seed=3, **draws))
        ids, log_probs = read(served[0], prompt, seed=3, **draws)
        first, *places = choice.prompt_logprobs
        assert first is None
        assert len(places) == len(ids) - 1
        for token, place, row in zip(ids[1:], places, log_probs, strict=True):
            best = row.topk(most).indices.tolist()
            assert list(place) == list(map(str, dict.fromkeys([token, *best])))
            for number, found in place.items():
                value = row[int(number)]
                assert found["logprob"] == pytest.approx(float(value), rel=1e-3, abs=1e-5)
                assert found["rank"] == int((row > value).sum()) + 1
                assert found["decoded_token"] == served[0].tokenizer.decode([int(number)])


def test_the_draws_of_a_long_text_take_turns(served, monkeypatch):
    ids, options = [4, 5, 60, 7], {"num_draws": 5, "seed": 3, "top": 2}
    together = likelihood.read_tokens(served[0].model, ids, **options)
    _, log_probs = read(served[0], words(*ids), 5, 3)
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 2 * len(ids) * 64)  # two draws at a time
    apart = likelihood.read_tokens(served[0].model, ids, **options)
    for reading in (together, apart):
        torch.testing.assert_close(reading.top_log_probs, log_probs.topk(2).values)
        torch.testing.assert_close(reading.log_probs, log_probs[range(3), ids[1:]])
    assert torch.equal(together.top, apart.top)
    with pytest.raises(bara.BaraError, match="no tokens"):
        likelihood.read_tokens(served[0].model, [])


def test_an_echo_scores_the_prompt_as_the_answer_was_scored(client):
    """Read again with its answer, a prompt has the log-probabilities that the answer had."""
    asked = {"model": "words", "logprobs": 2, "extra_body": {"num_draws": 5}}
    said = client.completions.create(prompt=words(4, 5), max_tokens=5, **asked).choices[0]
    whole = f"{words(4, 5)} {said.text}"
    (echo,) = client.completions.create(prompt=whole, max_tokens=1, echo=True, **asked).choices
    tokens, count = echo.logprobs, len(said.logprobs.tokens)
    assert echo.text.startswith(whole)
    assert tokens.tokens[: 2 + count] == whole.split()
    assert tokens.token_logprobs[0] is tokens.top_logprobs[0] is None
    assert tokens.token_logprobs[2 : 2 + count] == pytest.approx(
        said.logprobs.token_logprobs, rel=1e-3, abs=1e-5
    )
    for again, before in zip(tokens.top_logprobs[2:], said.logprobs.top_logprobs, strict=False):
        assert again == pytest.approx(before, rel=1e-3)
    for name, start in zip(tokens.tokens, tokens.text_offset, strict=True):
        assert echo.text[start:].strip().startswith(name)
    assert len(tokens.tokens) == len(tokens.top_logprobs) == 3 + count
    asked.pop("logprobs")
    (plain,) = client.completions.create(prompt=whole, max_tokens=1, echo=True, **asked).choices
    assert plain.text == echo.text
    assert plain.logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop(client, served, stream):
    generation = expected(served, words(4, 5), max_new_tokens=8)
    said = generation.text.split()
    stop = f"{said[2]} {said[3]}"
    given = {"model": "words", "prompt": words(4, 5), "max_tokens": 8, "stop": [stop, "nothing"]}
    answer = client.completions.create(**given, stream=stream)
    choices = [event.choices[0] for event in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    assert text == generation.text[: generation.text.find(stop)]
    assert choices[-1].finish_reason == "stop"


def test_stops_in_pieces():
    """Against a search in the whole text, for every way to cut it into pieces."""
    text, stops = "abcabdabcd ef", ("abcd", "bdx", "ab d")
    for cuts in range(2 ** (len(text) - 1)):
        if cuts % 7:  # a part of them is enough
            continue
        stop, shown, piece = StopText(stops), "", ""
        for i, letter in enumerate(text):
            piece += letter
            if cuts >> i & 1 or i == len(text) - 1:
                if not stop.stopped:
                    shown += stop.add(piece)
                assert text.startswith(shown)
                piece = ""
        assert stop.stopped
        assert shown == text[: text.find("abcd")]
    held = StopText(("xyz",))
    assert held.add("a xy") == "a "
    assert held.rest() == "xy"
    assert not held.stopped


def test_abstaining_under_a_calibrated_threshold(client, served):
    generation = expected(served, MESSAGES, max_new_tokens=4)
    conditions = {"measure": "answers", "num_draws": 8, "seed": 0, "chat": True}
    conditions["decoding"] = {"max_new_tokens": 4}
    for risk, margin in ((0.2, 0.01), (0.3, -0.01)):
        threshold = Threshold(generation.uncertainty + margin, risk, 0.1, 0.5, 100)
        save_threshold(served[0].folder, threshold, **conditions)
    given = {"model": "words", "messages": MESSAGES, "max_tokens": 4}
    kept = client.chat.completions.create(**given, extra_body={"abstain_at_risk": 0.2})
    assert kept.choices[0].uncertainty["abstained"] is False
    assert kept.choices[0].message.content == generation.text
    declined = client.chat.completions.create(
        **given, logprobs=True, extra_body={"abstain_at_risk": 0.3}
    )
    (choice,) = declined.choices
    assert choice.uncertainty["abstained"] is True
    assert choice.message.content == ""
    assert "risk of 0.3" in choice.message.refusal
    assert choice.logprobs is None
    assert choice.uncertainty["tokens"] == []
    streamed = client.chat.completions.create(
        **given, stream=True, extra_body={"abstain_at_risk": 0.3}
    )
    assert list(streamed)[-1].choices[0].uncertainty["abstained"] is True
    with pytest.raises(openai.BadRequestError, match="calibrated with decoding"):
        client.chat.completions.create(
            **given | {"max_tokens": 5}, extra_body={"abstain_at_risk": 0.3}
        )


CHAT = {"model": "words", "messages": MESSAGES}
BAD = [
    ("chat", {"messages": []}, "messages must be a list of 1 or more"),
    ("chat", {"messages": [{"role": "user"}]}, "messages.0.content must be text"),
    ("chat", {"messages": [{"role": "cook", "content": "w4"}]}, "messages.0.role must be one of"),
    ("chat", {"messages": [{"role": "user", "content": "w4", "x": 1}]}, "messages.0.x is not"),
    ("chat", {"n": 2}, "n must be at most 1"),
    ("chat", {"tools": []}, "tools is not supported here"),
    ("chat", {"logit_bias": {"4": 1}}, "logit_bias is not supported here"),
    ("chat", {"presence_penalty": 0.5}, "presence_penalty must be at most 0"),
    ("chat", {"max_tokens": 31}, "max_tokens: at most 30 here"),
    ("chat", {"num_draws": 17}, "num_draws: at most 16 here"),
    ("chat", {"temperature": 3}, "temperature must be at most 2"),
    ("chat", {"top_logprobs": 21}, "top_logprobs must be at most 20"),
    ("chat", {"stop": [3]}, "stop must be text, not [3]"),
    ("chat", {"stop": ["a"] * 5}, "stop must be"),
    ("chat", {"seed": -1}, "seed must be at least 0"),
    ("chat", {"response_format": {"type": "json_object"}}, "response_format.type must be 'text'"),
    ("chat", {"messages": [{"role": "user", "content": words(*[4] * 63)}]}, "does not fit"),
    ("chat", {"model": "reviews"}, "reviews is no language model"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": ["w4"] * 4}, "prompt: at most 3 here"),
    ("completions", {"prompt": [3, 4]}, "prompt"),
    ("completions", {"prompt": "w4", "echo": 1}, "echo must be true or false"),
    ("completions", {"prompt": "w4", "prompt_logprobs": 21}, "prompt_logprobs must be at most 20"),
    ("completions", {"prompt": "w4", "prompt_logprobs": -1}, "prompt_logprobs must be at least 0"),
    (
        "completions",
        {"prompt": words(*[4] * 31), "prompt_logprobs": 0, "stream": False},
        "at most 30",
    ),
    ("completions", {"prompt": "w4", "prompt_logprobs": 0, "stream": True}, "for a stream"),
    ("completions", {"prompt": "w4", "echo": True, "stream": True}, "for a stream"),
    ("chat", {"top_p": 0.5}, "top_p needs a temperature"),
    ("completions", {"prompt": "w4", "top_p": 0.5}, "top_p needs a temperature"),
    ("chat", {"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ("chat", {"prompt_logprobs": 0}, "prompt_logprobs is not supported here"),
]


@pytest.mark.parametrize(("route", "body", "message"), BAD, ids=[str(b[1])[:40] for b in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_the_client_s_fault(client, route, body, message, stream):
    path = "/chat/completions" if route == "chat" else "/completions"
    given = (CHAT if route == "chat" else {"model": "words"}) | {"stream": stream} | body
    with pytest.raises(openai.BadRequestError) as error:
        client.post(path, body=given, cast_to=object)
    assert message in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"


def test_unknown_models_and_lists(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        client.chat.completions.create(model="x", messages=MESSAGES)
    assert [model.id for model in client.models.list()] == ["words", "reviews"]
    assert client.models.retrieve("words").task == "causal-lm"


def test_a_model_that_fails_in_the_middle_of_a_stream(client, monkeypatch):
    def failing(sampler, inputs, seed, take):
        def twice(row, token, log_probs):
            count.append(token)
            if len(count) == 3:
                raise RuntimeError("/secret/path")
            return take(row, token, log_probs)

        count = []
        decode_rows(sampler, inputs, seed, twice)

    decode_rows = decoding.decode_rows
    monkeypatch.setattr(decoding, "decode_rows", failing)
    stream = client.completions.create(model="words", prompt="w4", stream=True, max_tokens=9)
    next(stream)
    next(stream)
    with pytest.raises(openai.APIError, match="the server failed"):
        next(stream)
    with pytest.raises(openai.InternalServerError, match="the server failed"):
        client.completions.create(model="words", prompt="w4", max_tokens=9)


def test_a_stream_that_nobody_reads_ends(client, monkeypatch):
    """The client goes after two tokens; the model stops long before the last one."""
    ended, count = threading.Event(), []

    def counted(sampler, inputs, seed, take):
        def slow(row, token, log_probs):
            count.append(token)
            ended.wait(0.05)
            return take(row, token, log_probs)

        decode_rows(sampler, inputs, seed, slow)
        ended.set()

    decode_rows = decoding.decode_rows
    monkeypatch.setattr(decoding, "decode_rows", counted)
    stream = client.completions.create(model="words", prompt="w4 w5", stream=True, max_tokens=30)
    next(stream)
    next(stream)
    stream.close()
    assert ended.wait(20)
    assert len(count) < 25


def test_the_rank_of_a_conversation(client, served):
    answer = client.post("/rank", body={"model": "words", "messages": MESSAGES}, cast_to=object)
    ids = {"input_ids": [4, 5, 9], "attention_mask": [1, 1, 1]}
    rank = bara.effective_rank(served[0].model, [ids], progress=False)
    assert answer["mean"] == pytest.approx(rank.s_bar, rel=1e-4)
    assert len(answer["layers"]) == len(rank.layers)


def test_events_are_plain_lines(url):
    import httpx

    body = {"model": "words", "prompt": "w4", "stream": True, "max_tokens": 3}
    text = httpx.post(f"{url}/v1/completions", json=body).text
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    log_probs = [e["choices"][0]["uncertainty"].get("log_prob") for e in events]
    assert events[-1]["choices"][0]["finish_reason"]
    score = events[-1]["choices"][0]["uncertainty"]["score"]
    assert math.fsum(log_probs[:-1]) / len(log_probs[:-1]) == pytest.approx(score)
