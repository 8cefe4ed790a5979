"""Generation, likelihoods and training of models with an encoder, against whole forward passes."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import bara
from bara import BaraError
from bara.language.evaluation import token_metrics
from bara.language.tasks import LanguageTask
from encoder_decoders import adapted_seq2seq, ending_tokenizer, features, tiny_seq2seq
from language_models import adapted_lm, word_tokenizer, words
from test_elbo import GradientRecorder

PROMPTS = [words(4, 5, 6, 7, 8), words(9), words(11, 3, 12)]
DRAWS = 3
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ARCHITECTURES = ["t5", "bart", "whisper"]


@pytest.fixture(scope="module")
def tokenizer():
    return ending_tokenizer()


def asked(architecture, tokenizer):
    """What `bara.generate` is given, and each question as the model's own inputs."""
    if architecture == "whisper":
        tensors = features(len(PROMPTS))
        return {"input_features": tensors}, [{"input_features": row[None]} for row in tensors]
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return PROMPTS, [{"input_ids": torch.tensor([row])} for row in ids]


@torch.no_grad()
def draw_log_probs(model, inputs, answer, num_draws=DRAWS, seed=0):
    """(S, T + 1, V) after the decoder's start and after every token, one draw at a time."""
    start = model.config.decoder_start_token_id
    result = []
    for draw in range(num_draws):
        with bara.sampling(model, seed=seed, first_draw=draw):
            logits = model(
                **inputs, decoder_input_ids=torch.tensor([[start, *answer]]), use_cache=False
            ).logits
        result.append(logits[0].log_softmax(-1))
    return torch.stack(result)


def mixture(draws):
    return draws.exp().mean(0).log()


@pytest.mark.parametrize(
    ("architecture", "method"),
    [("t5", "bara"), ("bart", "balora"), ("whisper", "bara")],
)
def test_greedy_answers_are_those_of_whole_forward_passes(tokenizer, architecture, method):
    model = adapted_seq2seq(architecture, method)
    prompts, inputs = asked(architecture, tokenizer)
    answers = bara.generate(
        model, tokenizer, prompts, num_draws=DRAWS, max_new_tokens=5, output_logits=True
    )
    assert len({tuple(answer.tokens.tolist()) for answer in answers}) > 1
    for given, answer in zip(inputs, answers, strict=True):
        tokens = answer.tokens.tolist()
        assert len(tokens) == 5 or tokens[-1] == 2
        draws = draw_log_probs(model, given, tokens)[:, :-1]
        mixed = mixture(draws)
        assert mixed.argmax(-1).tolist() == tokens
        torch.testing.assert_close(answer.log_probs, mixed, **CLOSE)
        total = torch.distributions.Categorical(logits=mixed).entropy()
        aleatoric = torch.distributions.Categorical(logits=draws).entropy().mean(0)
        torch.testing.assert_close(answer.total_uncertainty, total, **CLOSE)
        torch.testing.assert_close(answer.epistemic_uncertainty, total - aleatoric, **CLOSE)
        assert answer.epistemic_uncertainty.max() > 1e-4
    for draw, text in enumerate(answers[0].answers):
        own = []
        while len(own) < 5 and own[-1:] != [2]:
            own.append(int(draw_log_probs(model, inputs[0], own)[draw, -1].argmax()))
        assert text == tokenizer.decode(own, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("t5", {}),
        ("bart", {"num_beams": 3}),
        ("whisper", {}),
        ("whisper", {"num_return_sequences": 2}),
    ],
)
def test_the_encoder_runs_once_for_all_tokens(tokenizer, architecture, options):
    """In one batch of all draws; and once more where every draw answers on its own."""
    model = adapted_seq2seq(architecture)
    prompts, _ = asked(architecture, tokenizer)
    rows = []
    encoder = model.get_base_model().get_encoder()
    handle = encoder.register_forward_hook(lambda _, __, output: rows.append(len(output[0])))
    for agreement in (False, True):
        rows.clear()
        answers = bara.generate(
            model,
            tokenizer,
            prompts,
            num_draws=DRAWS,
            max_new_tokens=6,
            agreement=agreement,
            do_sample="num_return_sequences" in options,
            **options,
        )
        times = 2 if architecture == "whisper" and "num_return_sequences" in options else 1
        assert rows[0] == DRAWS * len(PROMPTS) * times  # Whisper repeats its inputs itself
        assert len(rows) == (2 if agreement else 1)
        assert max(len(answer.tokens) for answer in answers) > 3
    handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beams_keep_the_cache_and_the_source_of_their_draw(tokenizer, architecture):
    model = adapted_seq2seq(architecture)
    prompts, inputs = asked(architecture, tokenizer)
    answers = bara.generate(
        model, tokenizer, prompts, num_draws=DRAWS, max_new_tokens=5, num_beams=4, seed=2
    )
    for answer, given in zip(answers, inputs, strict=True):
        tokens = answer.tokens.tolist()
        draws = draw_log_probs(model, given, tokens, seed=2)[:, :-1]
        expected = mixture(draws)[range(len(tokens)), tokens]
        torch.testing.assert_close(answer.token_log_probs, expected, **CLOSE)


@pytest.mark.parametrize("architecture", ["t5", "whisper"])
def test_other_prompts_batches_and_caches_change_nothing(tokenizer, architecture):
    """A padded source reads as it does alone."""
    model = adapted_seq2seq(architecture)
    prompts, _ = asked(architecture, tokenizer)
    options = {"num_draws": 2, "max_new_tokens": 5}
    together = bara.generate(model, tokenizer, prompts, **options)
    for others in ({"batch_size": 1}, {"use_cache": False}):
        for answer, same in zip(
            together, bara.generate(model, tokenizer, prompts, **options, **others), strict=True
        ):
            assert answer.text == same.text
            assert answer.answers == same.answers
            torch.testing.assert_close(answer.total_uncertainty, same.total_uncertainty, **CLOSE)


@pytest.mark.parametrize("architecture", ["bart", "whisper"])
def test_a_stream_has_the_answer_token_by_token(tokenizer, architecture):
    model = adapted_seq2seq(architecture)
    prompts, _ = asked(architecture, tokenizer)
    one = {k: v[:1] for k, v in prompts.items()} if architecture == "whisper" else prompts[0]
    options = {"num_draws": DRAWS, "max_new_tokens": 5}
    (answer,) = bara.generate(model, tokenizer, one, agreement=False, **options)
    tokens = list(bara.generate_stream(model, tokenizer, one, **options))
    assert [token.token for token in tokens] == answer.tokens.tolist()
    assert [token.total for token in tokens] == pytest.approx(answer.total_uncertainty.tolist())
    if architecture == "whisper":
        with pytest.raises(BaraError, match="answers one prompt, not 3"):
            bara.generate_stream(model, tokenizer, prompts)


def test_whisper_finds_out_the_language_before_its_first_token(tokenizer):
    """A further call of the model, which is no step; the language becomes part of the prefix."""
    model = adapted_seq2seq("whisper")
    config = model.get_base_model().generation_config
    config.is_multilingual = True
    config.lang_to_id = {"<|en|>": 20, "<|fr|>": 21}
    config.task_to_id = {"transcribe": 30, "translate": 31}
    config.no_timestamps_token_id = 40
    calls = []
    handle = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
    one = {"input_features": features(1)}
    options = {"num_draws": DRAWS, "max_new_tokens": 4, "agreement": False}
    answer = bara.generate(model, tokenizer, one, **options)[0]
    assert len(calls) == len(answer.tokens) + 1
    handle.remove()
    found = mixture(draw_log_probs(model, one, []))[-1, [20, 21]].argmax()
    prefix = [20 + int(found), 40]  # no task where nobody named one
    tokens = answer.tokens.tolist()
    draws = draw_log_probs(model, one, prefix + tokens)[:, len(prefix) : -1]
    expected = mixture(draws)[range(len(tokens)), tokens]
    torch.testing.assert_close(answer.token_log_probs, expected, **CLOSE)
    told = bara.generate(model, tokenizer, one, language="fr", task="translate", **options)[0]
    tokens = told.tokens.tolist()
    draws = draw_log_probs(model, one, [21, 31, 40, *tokens])[:, 3:-1]
    torch.testing.assert_close(
        told.token_log_probs, mixture(draws)[range(len(tokens)), tokens], **CLOSE
    )


def test_the_mean_and_a_model_without_a_posterior_are_single_models(tokenizer):
    base = tiny_seq2seq("t5").eval()
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    expected = base.generate(ids, max_new_tokens=5)[0, 1:].tolist()
    (answer,) = bara.generate(base, tokenizer, PROMPTS[0], num_draws=4, max_new_tokens=5)
    assert answer.tokens.tolist() == expected
    assert answer.epistemic_uncertainty.abs().max() < 1e-6
    model = adapted_seq2seq("t5", "balora")
    expected = model.generate(input_ids=ids, max_new_tokens=5)[0, 1:].tolist()
    (mean,) = bara.generate(model, tokenizer, PROMPTS[0], deterministic=True, max_new_tokens=5)
    assert mean.tokens.tolist() == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_with_one_draw_a_repetition_penalty_sees_the_models_own_logits(
    tokenizer, architecture, options
):
    model = adapted_seq2seq(architecture)
    given, single = asked(architecture, tokenizer)
    options = options | {"max_new_tokens": 8, "repetition_penalty": 1.5}
    answers = bara.generate(model, tokenizer, given, deterministic=True, **options)
    for answer, one in zip(answers, single, strict=True):
        own = model.generate(**one, **options)[0].tolist()
        start = 0 if architecture == "whisper" else 1  # Whisper leaves out start and end
        assert answer.text == tokenizer.decode(own[start:], skip_special_tokens=True)
        assert answer.text


def test_what_cannot_be_asked_is_refused(tokenizer):
    model = adapted_seq2seq("bart")

    def refused(model, prompts, match, **options):
        with pytest.raises(BaraError, match=match):
            bara.generate(model, tokenizer, prompts, **options)

    refused(model, [[{"role": "user", "content": "w4"}]], "takes a text as its prompt")
    refused(model, " ", "A prompt is empty")
    refused(model, [], "There is no prompt")
    refused(model, words(*range(4, 40)), "A prompt of 37 tokens does not fit the model's context")
    refused(model, "w4", "and 40 new ones does not fit", max_new_tokens=40)
    refused(model, "w4", "with decoder_input_ids", decoder_input_ids=torch.tensor([[2]]))
    refused(model, "w4", "with return_timestamps", return_timestamps=True)
    refused(adapted_lm(), {"input_ids": torch.tensor([[4]])}, "for models with an encoder")
    with pytest.raises(BaraError, match=r"use bara\.generate for a BartForConditionalGen"):
        bara.predict(model, {"input_ids": torch.tensor([[4]])})
    with pytest.raises(BaraError, match="decoder-only model"):
        bara.multiple_choice(model, tokenizer, [{"question": "w4", "choices": ["w5", "w6"]}])


# -- training and likelihoods ----------------------------------------------------------------------

ROWS = [
    {"prompt": words(4, 5, 6), "completion": words(7, 8)},
    {"prompt": words(9), "completion": words(10, 11, 12, 13)},
    {"prompt": words(5, 4, 3, 8, 6, 7), "completion": words(8)},
    {"prompt": words(20, 21), "completion": words(22, 23)},
]
LABELS = sum(len(row["completion"].split()) + 1 for row in ROWS)  # and the end of text


def table(tokenizer):
    return LanguageTask("seq2seq").inputs(Dataset.from_list(ROWS), tokenizer)


def test_rows_are_a_source_and_labels_that_end(tokenizer):
    rows = table(tokenizer)
    assert rows[0]["input_ids"] == [4, 5, 6, 2]
    assert rows[0]["labels"] == [7, 8, 2]
    plain = LanguageTask("seq2seq").inputs(Dataset.from_list(ROWS), word_tokenizer())
    assert plain[0]["input_ids"] == [4, 5, 6]
    assert plain[0]["labels"] == [7, 8, 2]
    for row, match in [
        ({"prompt": "w4", "completion": ""}, "row 1: give texts under 'prompt' and 'completion'"),
        ({"text": "w4 w5"}, "row 1: give texts under 'prompt' and 'completion'"),
        ({"prompt": words(*range(4, 20)), "completion": "w4"}, "row 1 has 17 tokens"),
        ({"prompt": "w4", "completion": words(*range(4, 20))}, "row 1 has 17 tokens"),
    ]:
        task = LanguageTask("seq2seq", max_length=16)
        with pytest.raises(BaraError, match=match):
            task.inputs(Dataset.from_list([row]), tokenizer)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_likelihoods_are_those_of_the_mixture_token_by_token(tokenizer, architecture):
    model = adapted_seq2seq(architecture)
    rows = table(tokenizer)
    metrics = token_metrics(model, rows, num_draws=DRAWS, batch_size=2 * DRAWS)
    nll, right = 0.0, 0
    for row in rows:
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        mixed = mixture(draw_log_probs(model, inputs, row["labels"]))[:-1]
        nll -= float(mixed[range(len(row["labels"])), row["labels"]].sum())
        right += int((mixed.argmax(-1) == torch.tensor(row["labels"])).sum())
    assert metrics["nll"] == pytest.approx(nll / LABELS, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / LABELS), rel=1e-3)
    assert metrics["accuracy"] == pytest.approx(right / LABELS)


def test_the_rank_in_use_is_measured_with_the_labels(tokenizer):
    """Which the decoder makes its inputs of; each input as it is alone."""
    model, rows = adapted_seq2seq("t5"), table(tokenizer)
    rank = bara.effective_rank(model, rows)
    assert any("decoder" in layer for layer in rank.layers)
    alone = bara.effective_rank(model, rows.select([1]))
    torch.testing.assert_close(alone.soft[:, 0], rank.soft[:, 1], **CLOSE)


def batch_of(tokenizer, rows):
    return DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows])


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_the_loss_is_the_elbo_per_label_token(tokenizer, architecture):
    """loss(beta) - loss(0) = beta KL / N under the same noise; and the data loss is the mean over
    the labels that are not -100."""
    losses, kl = {}, None
    for weight in (0.0, 3.0):
        model = adapted_seq2seq(
            architecture, kl_weight=weight, local_kl_weight=0.0, num_observations=7, warmup=0.0
        )
        batch = batch_of(tokenizer, table(tokenizer))
        assert (batch["labels"] == -100).any()
        model.train()
        torch.manual_seed(5)
        output = model(**batch)
        losses[weight] = output.loss.item()
        kl = bara.kl_terms(model)["kl_global"]
        if weight == 0:
            known = batch["labels"] != -100
            log_probs = output.logits[known].log_softmax(-1)
            nll = -log_probs.gather(1, batch["labels"][known].unsqueeze(1)).mean()
            assert losses[weight] == pytest.approx(nll.item(), rel=1e-4)
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * kl / 7, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "first"),
    [("t5", "block.0.layer.0.SelfAttention.q"), ("bart", "layers.0.self_attn.q_proj")],
)
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_padding_counts_in_neither_side_s_gates(tokenizer, architecture, first, side):
    """A batch's local KL is the mean, over its labels, of what each row has alone. On a first
    layer, whose input no draw has changed."""
    model = adapted_seq2seq(
        architecture,
        target_modules=rf".*{side}\.{first}",
        weight_noise=0,
        num_observations=7,
        warmup=0.0,
    )
    model.train()
    rows = list(table(tokenizer))

    def local_kl(rows):
        model(**batch_of(tokenizer, rows))
        return bara.kl_terms(model)["kl_local"]

    counts = [len(row["labels"]) for row in rows]
    alone = [local_kl([row]) for row in rows]
    expected = sum(n * kl for n, kl in zip(counts, alone, strict=True)) / sum(counts)
    assert max(alone) - min(alone) > 1e-2 * expected
    assert local_kl(rows) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_n_counts_label_tokens_and_accumulation_changes_no_gradient(
    tokenizer, tmp_path, architecture
):
    """Micro-batches with unequal numbers of labels, under one fixed draw."""

    def step(size):
        model = adapted_seq2seq(architecture, num_observations=None, warmup=0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            max_grad_norm=0,
            learning_rate=0.0,
            train_sampling_strategy="sequential",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = GradientRecorder(
            model,
            arguments,
            train_dataset=table(tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[bara.BayesianCallback()],
        )
        trainer.train()
        assert model.peft_config["default"].resolved.num_observations == LABELS
        return trainer.recorded

    whole, parts = step(4), step(1)
    for name, gradient in whole.items():
        assert (gradient - parts[name]).norm() <= 1e-2 * gradient.norm() + 1e-7, name
