"""bara.generate and bara.generate_stream against forwards of the whole text, draw by draw."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, LlamaForSequenceClassification

import bara
from bara import BaraError
from bara.adapter.elbo import Elbo
from bara.language.evaluation import answer_losses, token_metrics
from bara.methods.ensemble import member_name
from helpers import adapt, stir
from language_models import adapted_lm, lora_ensemble, tiny_lm, word_tokenizer, words

PROMPTS = [words(4, 5, 6, 7, 8), words(9), words(11, 3, 12)]
IDS = [[4, 5, 6, 7, 8], [9], [11, 3, 12]]
DRAWS = 3
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def model():
    return adapted_lm()


@torch.no_grad()
def draw_log_probs(model, ids, num_draws=DRAWS, seed=0):
    """(S, T, V) log-probabilities after every position, without a cache, one draw at a time."""
    result = []
    for draw in range(num_draws):
        with bara.sampling(model, seed=seed, first_draw=draw):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        result.append(logits[0].log_softmax(-1))
    return torch.stack(result)


def mixture(draws):
    return draws.exp().mean(0).log()


def greedy_by_hand(model, ids, steps, seed=0):
    answer = []
    while len(answer) < steps and answer[-1:] != [2]:
        answer.append(int(mixture(draw_log_probs(model, ids + answer, seed=seed))[-1].argmax()))
    return answer


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("method", ["bara", "balora"])
def test_greedy_text_and_uncertainties_are_those_of_uncached_forwards(
    tokenizer, architecture, method
):
    model = adapted_lm(architecture, method)
    answers = bara.generate(
        model, tokenizer, PROMPTS, num_draws=DRAWS, max_new_tokens=5, output_logits=True
    )
    for ids, answer in zip(IDS, answers, strict=True):
        tokens = answer.tokens.tolist()
        assert tokens == greedy_by_hand(model, ids, 5)
        draws = draw_log_probs(model, ids + tokens)[:, len(ids) - 1 : -1]
        mixed = mixture(draws)
        torch.testing.assert_close(answer.log_probs, mixed, **CLOSE)
        torch.testing.assert_close(
            answer.token_log_probs, mixed[range(len(tokens)), tokens], **CLOSE
        )
        total = torch.distributions.Categorical(logits=mixed).entropy()
        aleatoric = torch.distributions.Categorical(logits=draws).entropy().mean(0)
        torch.testing.assert_close(answer.total_uncertainty, total, **CLOSE)
        torch.testing.assert_close(answer.epistemic_uncertainty, total - aleatoric, **CLOSE)
        assert answer.epistemic_uncertainty.max() > 1e-4
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(answer.pieces) == answer.text
        assert answer.score == pytest.approx(float(answer.token_log_probs.mean()))
        assert answer.uncertainty == pytest.approx(1 - math.exp(answer.score))


def test_every_draws_own_answer_is_its_uncached_decoding(model, tokenizer):
    answers = bara.generate(model, tokenizer, PROMPTS, num_draws=DRAWS, seed=4, max_new_tokens=5)
    for ids, answer in zip(IDS, answers, strict=True):
        for draw, text in enumerate(answer.answers):
            own = []
            while len(own) < 5 and own[-1:] != [2]:
                logits = draw_log_probs(model, ids + own, seed=4)[draw, -1]
                own.append(int(logits.argmax()))
            assert text == tokenizer.decode(own, skip_special_tokens=True)
    assert len({text for answer in answers for text in answer.answers}) > len(PROMPTS)


@torch.no_grad()
def two_tokens_by_enumeration(model, ids):
    """Log-probability under the mixture of all continuations of two tokens."""
    first = mixture(draw_log_probs(model, ids))[-1]
    every = torch.tensor([[*ids, token] for token in range(64)])
    second = torch.zeros(64, 64)
    for draw in range(DRAWS):
        with bara.sampling(model, seed=0, first_draw=draw):
            second += model(input_ids=every, use_cache=False).logits[:, -1].softmax(-1) / DRAWS
    both = first[:, None] + second.log()
    scores = {(a, b): float(both[a, b]) for a in range(64) for b in range(64) if a != 2}
    return scores | {(2,): float(first[2])}


def test_beams_search_the_mixture_and_keep_every_draws_cache(model, tokenizer):
    """With as many beams as tokens the search is exhaustive; a beam that got another's cache, or
    another draw's, would not find the best text."""
    answers = bara.generate(
        model,
        tokenizer,
        PROMPTS[:2],
        num_draws=DRAWS,
        max_new_tokens=2,
        num_beams=64,
        length_penalty=0.0,
        num_return_sequences=2,
        agreement=False,
    )
    assert len(answers) == 4
    for ids, best, second in zip(IDS[:2], answers[::2], answers[1::2], strict=True):
        scores = two_tokens_by_enumeration(model, ids)
        expected = sorted(scores.values(), reverse=True)[:2]
        for answer, value in zip((best, second), expected, strict=True):
            tokens = tuple(answer.tokens.tolist())
            assert scores[tokens] == pytest.approx(value, abs=1e-4)
            assert float(answer.token_log_probs.sum()) == pytest.approx(value, abs=1e-4)


def test_longer_beams_record_their_own_tokens(model, tokenizer):
    for answer, ids in zip(
        bara.generate(
            model, tokenizer, PROMPTS, num_draws=DRAWS, max_new_tokens=6, num_beams=4, seed=2
        ),
        IDS,
        strict=True,
    ):
        tokens = answer.tokens.tolist()
        draws = draw_log_probs(model, ids + tokens, seed=2)[:, len(ids) - 1 : -1]
        expected = mixture(draws)[range(len(tokens)), tokens]
        torch.testing.assert_close(answer.token_log_probs, expected, **CLOSE)


def test_sampled_tokens_have_the_mixtures_frequencies(model, tokenizer):
    answers = bara.generate(
        model,
        tokenizer,
        PROMPTS[0],
        num_draws=DRAWS,
        max_new_tokens=1,
        do_sample=True,
        top_k=0,
        num_return_sequences=1000,
        agreement=False,
    )
    counts = torch.bincount(torch.tensor([int(a.tokens[0]) for a in answers]), minlength=64)
    probs = mixture(draw_log_probs(model, IDS[0]))[-1].exp()
    error = (probs * (1 - probs) / 1000).sqrt()
    assert ((counts / 1000 - probs).abs() < 4.5 * error + 1e-4).all()


def test_same_seed_same_text_and_the_callers_generator_is_left_alone(model, tokenizer):
    def sampled(seed):
        answers = bara.generate(
            model, tokenizer, PROMPTS, num_draws=2, seed=seed, do_sample=True, max_new_tokens=6
        )
        return [(answer.text, answer.answers) for answer in answers]

    torch.manual_seed(1)
    first = sampled(5)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after
    assert sampled(5) == first
    assert sampled(6) != first


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
        {"batch_size": 1},
    ],
)
@pytest.mark.parametrize("beams", [1, 3])
def test_options_that_change_the_way_change_no_answer(model, tokenizer, options, beams):
    def run(**options):
        return bara.generate(
            model,
            tokenizer,
            PROMPTS,
            num_draws=2,
            max_new_tokens=5,
            num_beams=beams,
            agreement=False,
            **options,
        )

    for answer, same in zip(run(), run(**options), strict=True):
        assert answer.text == same.text
        torch.testing.assert_close(answer.total_uncertainty, same.total_uncertainty, **CLOSE)


def test_a_static_cache_where_the_mask_is_one_for_each_type_of_layer(tokenizer):
    model = adapted_lm("qwen2")
    plain, static = (
        bara.generate(model, tokenizer, PROMPTS, num_draws=2, max_new_tokens=4, **options)
        for options in ({}, {"cache_implementation": "static"})
    )
    for answer, same in zip(plain, static, strict=True):
        assert answer.text == same.text
        torch.testing.assert_close(answer.total_uncertainty, same.total_uncertainty, **CLOSE)


def test_a_generation_config_is_read_like_options(model, tokenizer, monkeypatch):
    """Where it is silent the model's own holds: its end of text above all."""

    def run(**options):
        return bara.generate(model, tokenizer, PROMPTS, num_draws=2, agreement=False, **options)

    full = run(max_new_tokens=6)
    end = int(full[0].tokens[2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    short = run(max_new_tokens=6)
    length = full[0].tokens.tolist().index(end) + 1
    assert short[0].tokens.tolist() == full[0].tokens[:length].tolist()
    for config in (
        GenerationConfig(max_new_tokens=6),
        GenerationConfig(max_new_tokens=6, prefill_chunk_size=2),
    ):
        for answer, same in zip(short, run(generation_config=config), strict=True):
            assert answer.tokens.tolist() == same.tokens.tolist()
            torch.testing.assert_close(answer.token_log_probs, same.token_log_probs, **CLOSE)
    config = GenerationConfig(max_new_tokens=6, num_beams=3)
    for answer, same in zip(
        run(max_new_tokens=6, num_beams=3), run(generation_config=config), strict=True
    ):
        assert answer.tokens.tolist() == same.tokens.tolist()
    assert all(len(a.tokens) > 6 for a in run(generation_config=GenerationConfig(), eos_token_id=0))


def test_stop_strings_end_an_answer(model):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens("abcdef")  # a word that transformers looks at every token behind
    full = bara.generate(model, tokenizer, PROMPTS[0], num_draws=2, max_new_tokens=6)[0]
    stop = full.pieces[1].strip()
    answer = bara.generate(
        model, tokenizer, PROMPTS[0], num_draws=2, max_new_tokens=6, stop_strings=[stop]
    )[0]
    assert len(answer.tokens) < len(full.tokens)
    assert answer.tokens.tolist() == full.tokens[: len(answer.tokens)].tolist()
    assert stop in answer.text


def test_transformers_options_act_on_the_mixture(model, tokenizer):
    plain = bara.generate(model, tokenizer, PROMPTS[0], num_draws=2, max_new_tokens=3)[0]
    banned = [[int(plain.tokens[0])]]
    other = bara.generate(
        model, tokenizer, PROMPTS[0], num_draws=2, max_new_tokens=3, bad_words_ids=banned
    )[0]
    best = mixture(draw_log_probs(model, IDS[0], 2))[-1].argsort(descending=True)
    assert int(other.tokens[0]) == int(best[1])


def test_mean_mode_is_transformers_own_generation(model, tokenizer):
    answer = bara.generate(model, tokenizer, PROMPTS[0], deterministic=True, max_new_tokens=5)[0]
    ids = model.generate(input_ids=torch.tensor([IDS[0]]), max_new_tokens=5, do_sample=False)
    assert answer.tokens.tolist() == ids[0, 5:].tolist()
    assert answer.answers == ()
    assert answer.agreement is None
    assert answer.epistemic_uncertainty.max() < 1e-6


@torch.no_grad()
def draw_logits(model, ids, num_draws=DRAWS):
    """(S, V) logits after a text, without a cache, one draw at a time."""
    result = []
    for draw in range(num_draws):
        with bara.sampling(model, seed=0, first_draw=draw):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        result.append(logits[0, -1])
    return torch.stack(result)


def test_a_repetition_penalty_acts_on_logits(tokenizer):
    """It divides those above 0 and multiplies those below, so that a shift changes the answer."""
    model, penalty = adapted_lm(), 1.3
    # from zero up where they would be on both sides of it
    model.get_base_model().lm_head.weight.data *= 0.5
    options = {"max_new_tokens": 8, "repetition_penalty": penalty}
    answers = bara.generate(
        model, tokenizer, PROMPTS, num_draws=DRAWS, agreement=False, output_logits=True, **options
    )
    differ = 0
    for ids, answer in zip(IDS, answers, strict=True):
        given = list(ids)
        for step, token in enumerate(answer.tokens.tolist()):
            logits = draw_logits(model, given)
            mixed = mixture(logits.log_softmax(-1))
            torch.testing.assert_close(answer.log_probs[step], mixed, **CLOSE)

            def penalised(scores, given=given):
                seen = torch.zeros(64, dtype=bool)
                seen[given] = True
                small = torch.where(scores > 0, scores / penalty, scores * penalty)
                return int(torch.where(seen, small, scores).argmax())

            assert token == penalised(mixed + logits.logsumexp(-1).mean())
            differ += token != penalised(mixed)
            given.append(token)
    assert differ  # log-probabilities would have given another text


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "length_penalty": 0.5}, {"do_sample": True, "temperature": 2.0}],
    ids=["greedy", "beams", "sampled"],
)
def test_with_one_draw_every_option_sees_the_models_own_logits(tokenizer, options):
    options = options | {"max_new_tokens": 12, "repetition_penalty": 1.3}
    texts = []
    for seed in range(4):
        model = stir(adapted_lm(), seed).eval()
        model.get_base_model().lm_head.weight.data *= 0.5
        answer = bara.generate(model, tokenizer, PROMPTS[0], deterministic=True, **options)[0]
        torch.manual_seed(0)
        own = model.generate(input_ids=torch.tensor([IDS[0]]), pad_token_id=0, **options)[0, 5:]
        assert answer.tokens.tolist() == own.tolist()
        if "num_beams" not in options:
            stream = bara.generate_stream(
                model, tokenizer, PROMPTS[0], deterministic=True, **options
            )
            assert [token.token for token in stream] == own.tolist()
        texts.append(answer.text)
    assert len(set(texts)) > 1


def test_the_output_layer_is_given_contiguous_rows(model, tokenizer):
    """A view has PyTorch copy the layer's weights for each row."""
    found = []
    head = model.get_base_model().lm_head
    handle = head.register_forward_hook(lambda _, args, __: found.append(args[0].is_contiguous()))
    try:
        bara.generate(model, tokenizer, PROMPTS, num_draws=DRAWS, max_new_tokens=2)
        assert found
        assert all(found)
        model.generate(input_ids=torch.tensor([IDS[0], IDS[0]]), max_new_tokens=2)
        assert not all(found)
    finally:
        handle.remove()
    assert not head._forward_pre_hooks


def test_a_model_without_adapter_is_one_draw(tokenizer):
    answer = bara.generate(tiny_lm("llama"), tokenizer, PROMPTS[0], max_new_tokens=3)[0]
    assert answer.agreement == 1
    assert len(answer.answers) == 1


def test_a_merged_or_disabled_adapter_is_one_draw_of_text(tokenizer):
    model = adapted_lm("llama", "balora")
    options = {"max_new_tokens": 4, "num_draws": 3}

    def answer():
        return bara.generate(model, tokenizer, [words(4, 5)], **options)[0]

    assert (answer().epistemic_uncertainty > 0).all()
    with model.disable_adapter():
        alone = answer()
        (base,) = bara.generate(tiny_lm("llama").eval(), tokenizer, [words(4, 5)], **options)
    assert len(alone.answers) == 1
    assert alone.text == base.text
    torch.testing.assert_close(alone.token_log_probs, base.token_log_probs)
    model.merge_adapter()
    assert len(answer().answers) == 1


def test_agreement_is_the_similarity_of_the_draws_answers(model, tokenizer):
    answer = bara.generate(model, tokenizer, PROMPTS[1], num_draws=DRAWS, max_new_tokens=5)[0]
    told = dict(answer.to_record())
    assert told["agreement"] == answer.agreement
    similar = replace(answer, answers=("a b c", "a b c", "a b d"))
    # pairs: identical, and twice 2 * 2 / 6
    assert similar.agreement == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_streaming_yields_the_same_tokens_with_their_uncertainty(model, tokenizer):
    whole = bara.generate(model, tokenizer, PROMPTS[0], num_draws=DRAWS, max_new_tokens=6)[0]
    stream = list(
        bara.generate_stream(model, tokenizer, PROMPTS[0], num_draws=DRAWS, max_new_tokens=6)
    )
    assert [token.token for token in stream] == whole.tokens.tolist()
    assert "".join(token.text for token in stream) == whole.text
    for i, token in enumerate(stream):
        assert token.total == pytest.approx(float(whole.total_uncertainty[i]), abs=1e-5)
        assert token.epistemic == pytest.approx(float(whole.epistemic_uncertainty[i]), abs=1e-5)
        assert token.log_prob == pytest.approx(float(whole.token_log_probs[i]), abs=1e-5)


def test_a_stream_that_is_closed_leaves_the_model_as_it_was(model, tokenizer):
    stream = bara.generate_stream(model, tokenizer, PROMPTS[0], max_new_tokens=50)
    taken = list(itertools.islice(stream, 2))
    stream.close()
    assert len(taken) == 2
    assert Elbo.of(model).draws is None
    logits = model(input_ids=torch.tensor([IDS[0]])).logits
    assert logits.shape == (1, 5, 64)


CHAT = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w5{% endif %}"
)


def test_conversations_go_through_the_chat_template(model):
    tokenizer = word_tokenizer()
    messages = [{"role": "user", "content": words(4, 6)}]
    with pytest.raises(BaraError, match="no chat template"):
        bara.generate(model, tokenizer, [messages])
    tokenizer.chat_template = CHAT
    chat, text = bara.generate(
        model, tokenizer, [messages, words(4, 6, 5)], num_draws=2, max_new_tokens=4
    )
    assert chat.text == text.text
    assert chat.prompt == messages


def test_bad_input_is_one_clear_line(model, tokenizer, tiny_bert, tmp_path):
    def refused(match, model=model, tokenizer=tokenizer, prompts=PROMPTS, **options):
        with pytest.raises(BaraError, match=match) as error:
            bara.generate(model, tokenizer, prompts, **options)
        assert "\n" not in str(error.value)

    refused("no prompt", prompts=[])
    refused("A prompt is empty", prompts=[""])
    refused("5 tokens and 60 new ones does not fit the model's context of 64", max_new_tokens=60)
    classifier = stir(adapt(tiny_bert, task_type="SEQ_CLS"))
    refused("trained for classification cannot generate", model=classifier)
    refused("no pad token", tokenizer=word_tokenizer(pad_token=None), max_new_tokens=3)
    refused("num_draws must be at least 1", num_draws=0, max_new_tokens=3)
    refused("generate: ", max_new_tokens=3, no_such_option=1)
    refused("with prompt_lookup_num_tokens is not supported", prompt_lookup_num_tokens=3)
    for option, value in (("temperature", 0.7), ("top_p", 0.9), ("top_k", 5)):
        refused(f"{option} has no effect without do_sample", **{option: value}, max_new_tokens=3)
    refused("with guidance_scale is not supported", guidance_scale=1.5)
    too_long = "5 tokens and 60 new ones does not fit the model's context of 64"
    refused(too_long, generation_config=GenerationConfig(max_new_tokens=60))
    refused(too_long, max_length=65)
    folder = tmp_path / "classifier"
    adapt(
        LlamaForSequenceClassification(tiny_lm("llama").config),
        target_modules=["q_proj"],
        task_type="SEQ_CLS",
    ).save_pretrained(folder)
    misused = PeftModel.from_pretrained(tiny_lm("llama"), folder)
    refused("'default' was trained for another task, SEQ_CLS", model=misused)
    with pytest.raises(BaraError, match="Beams are chosen at the end"):
        bara.generate_stream(model, tokenizer, PROMPTS[0], num_beams=2)
    config = GenerationConfig(num_return_sequences=2, do_sample=True)
    with pytest.raises(BaraError, match="Beams are chosen at the end"):
        bara.generate_stream(model, tokenizer, PROMPTS[0], generation_config=config)
    broken = adapted_lm()
    broken.get_base_model().lm_head.weight.data[5] = float("nan")
    refused("logits are not finite", model=broken, max_new_tokens=3)
    with pytest.raises(BaraError, match="logits are not finite"):
        list(bara.generate_stream(broken, tokenizer, PROMPTS[0], max_new_tokens=3))


def test_an_error_leaves_no_hook_behind(model, tokenizer):
    before = len(model.get_base_model()._forward_hooks)
    with pytest.raises(BaraError):
        bara.generate(model, tokenizer, PROMPTS, max_new_tokens=3, no_such_option=1)
    assert len(model.get_base_model()._forward_hooks) == before
    assert not hasattr(model.get_base_model(), "_reorder_cache")
    assert Elbo.of(model).draws is None


def test_draws_of_whole_weights_are_not_decoded_as_one_batch(tokenizer):
    ensemble = lora_ensemble(2)
    with pytest.raises(BaraError, match="one draw at a time"):
        bara.generate(ensemble, tokenizer, PROMPTS)
    (answer, *_) = bara.generate(
        ensemble, tokenizer, PROMPTS, deterministic=True, max_new_tokens=3, agreement=False
    )
    assert answer.text


def test_a_threshold_answers_what_it_was_calibrated_to_answer(model, tokenizer):
    """The uncertainties are not rounded: a threshold is one of them, and that one is answered."""
    rows = [{"prompt": prompt, "completion": words(5)} for prompt in PROMPTS]
    options = {"num_draws": DRAWS, "max_new_tokens": 5}
    uncertainty, _ = answer_losses(model, tokenizer, Dataset.from_list(rows), **options)
    answers = bara.generate(model, tokenizer, PROMPTS, agreement=False, **options)
    assert uncertainty.tolist() == [answer.uncertainty for answer in answers]


def test_token_metrics_average_over_an_ensemble_s_members():
    ensemble = lora_ensemble(2)
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    table = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    probabilities = []
    for member in range(2):
        ensemble.set_adapter(member_name(member))
        with torch.no_grad():
            probabilities.append(ensemble(input_ids=ids).logits[0, :-1].softmax(-1))
    of_labels = torch.stack(probabilities).mean(0).gather(1, ids[:, 1:].T)
    nll = token_metrics(ensemble, table, progress=False)["nll"]
    assert nll == pytest.approx(-of_labels.log().mean().item(), rel=1e-5)
