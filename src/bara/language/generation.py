"""Text from a mixture over posterior draws, with an uncertainty on every token.

One answer is decoded for all draws: at each step the S draws' next-token probabilities are
averaged, and the token chosen from the average goes on in every draw. Total uncertainty is the
entropy of the average, epistemic what the draws disagree about (the "product of expectations" of
Malinin & Gales 2021, arXiv 2002.07650). Whether the draws would give the same answer on their own
is what `agreement` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bara.draws.blocks import Blocks, log_mean_exp
from bara.draws.draws import Draws, source_in_force
from bara.draws.sharing import decoding, evaluating, of_this_thread
from bara.errors import BaraError, first_line
from bara.language.answer import Generation
from bara.language.inputs import Inputs, Prompts, read_prompts
from bara.language.prompts import (
    Prompt,
    context,
    is_encoder_decoder,
    require_generator,
    require_room,
)
from bara.prediction.batches import progress_bar, to_device
from bara.prediction.likelihood import require_finite
from bara.prediction.outputs import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_NEW_TOKENS = 128
SAMPLED = {"temperature": (0, 1), "top_k": (0,), "top_p": (1,), "min_p": (0,), "typical_p": (1,)}
"""Options of tokens that are drawn, which greedy decoding does not read, and the values that
change nothing."""
REFUSED = (
    *("assistant_model", "prompt_lookup_num_tokens", "guidance_scale"),
    *("decoder_input_ids", "encoder_outputs"),
    *("return_timestamps", "compression_ratio_threshold", "logprob_threshold"),
    "no_speech_threshold",
)
"""Options under which a forward pass of the model is not one step of decoding, that decode several
times (Whisper's), or that bring what belongs to the prompts."""


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    num_draws: int = 8,
    seed: int = 0,
    deterministic: bool = False,
    agreement: bool = True,
    batch_size: int = 64,
    progress: bool | None = None,
    **options: Any,
) -> list[Generation]:
    """Answers prompts with the mixture over draws of the posterior.

    All draws are decoded together as one batch with a key-value cache, each under one fixed draw.
    Where the model has an encoder, it runs once per draw, before the first token. A model without a
    Bayesian adapter is one draw.

    Args:
        model: a model of transformers that generates, with an adapter of PEFT or without: a causal
            language model, or one with an encoder (T5, BART, Whisper, ...).
        tokenizer: the model's tokeniser (a processor's `tokenizer`).
        prompts: texts, or for a causal language model conversations (lists of messages); one text
            alone is a list of one. For an encoder that reads no text, what its processor made, such
            as `{"input_features": (n, bins, frames)}`.
        num_draws: S.
        seed: of the draws, and of the tokens where they are sampled. The same call gives the same
            answers; greedy and beam answers do not depend on the other prompts.
        deterministic: use the posterior mean, as `model.eval()` does, instead of draws.
        agreement: also decode every draw on its own, as a second batch, for `answers`.
        batch_size: most rows (prompts times draws times beams) decoded at a time, though all draws
            and beams of a prompt always are.
        progress: show a progress bar on standard error; None does so on a terminal, where there is
            more than one batch.
        **options: those of `transformers.generate` (`do_sample`, `temperature`, `num_beams`,
            `num_return_sequences`, ...), which sees the mixture as one model. Where no length is
            given, 128 new tokens at most, as far as the model's context goes.

    Returns:
        An answer per prompt, or `num_return_sequences` of them one after the other.

    Raises:
        BaraError: the model does not generate, a prompt does not fit the context, a chat template
            or pad token is missing, logits are not finite, or transformers refuses the options.
    """
    require_generator(model, "bara.generate")
    asked = read_prompts(model, tokenizer, prompts)
    longest = asked.longest
    sampler = DrawSampler(model, tokenizer, longest, num_draws, seed, deterministic, options)
    at_once = max(1, batch_size // sampler.rows_per_prompt)
    answers: list[Generation] = []
    starts = range(0, len(asked.rows), at_once)
    shown = False if progress is None and len(starts) == 1 else progress
    with decoding(model), seeded(seed):
        for start in progress_bar(starts, description="answering", progress=shown):
            part = asked.part(slice(start, start + at_once))
            answers += sampler.decode(part, agreement and not deterministic)
    return answers


class Step(NamedTuple):
    """One decoding step's next-token distributions, for n rows."""

    log_probs: Tensor  # (n, V) of the mixture
    total: Tensor  # (n,)
    aleatoric: Tensor  # (n,)
    tokens: int  # that the decoder was given in it


class DrawSampler:
    """Decodes with a model under fixed draws, either mixed or each on its own."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        longest_prompt: int,
        num_draws: int,
        seed: int,
        deterministic: bool,
        options: dict[str, Any],
    ) -> None:
        self.model: Any = model
        self.encodes = is_encoder_decoder(model)
        self.tokenizer = tokenizer
        self.source = source_in_force(model)
        if self.source and not (self.source.batched or deterministic):
            raise BaraError(
                "This model's method makes one draw at a time, and generation decodes all draws "
                "in one batch: pass deterministic=True (--set "
                "deterministic=true) for its mean, or train a method that draws in rank space, "
                "such as bara."
            )
        single = deterministic or self.source is None
        self.draws = Draws(1 if single else num_draws, seed)
        self.mean = deterministic
        self.options = {"pad_token_id": tokenizer.pad_token_id, **options}
        for name in REFUSED:
            if (value := self.setting(name)) is not None and value is not False:
                raise BaraError(f"Decoding a mixture of draws with {name} is not supported.")
        for name, idle in SAMPLED.items():
            if options.get(name) not in (None, *idle) and not self.setting("do_sample"):
                raise BaraError(f"{name} has no effect without do_sample=True: give both.")
        config = options.get("generation_config")
        new, most = (
            options.get(name, getattr(config, name, None))
            for name in ("max_new_tokens", "max_length")
        )
        if new is None and most is not None:
            new = max(1, most - longest_prompt)
        if new is None:
            room = context(model) - longest_prompt
            new = self.options["max_new_tokens"] = max(1, min(MAX_NEW_TOKENS, room))
        require_room(model, longest_prompt, int(new))

    def setting(self, name: str) -> Any:
        """An option as `transformers.generate` finds it: the call's, or a configuration's."""
        if name in self.options:
            return self.options[name]
        given = getattr(self.options.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if given is None else given

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        end = self.setting("eos_token_id")
        return frozenset(torch.tensor([] if end is None else end).flatten().long().tolist())

    @property
    def rows_per_prompt(self) -> int:
        rows = max(self.setting(name) or 1 for name in ("num_beams", "num_return_sequences"))
        return int(self.draws.num_draws * rows)

    def decode(self, asked: Inputs, agreement: bool) -> list[Generation]:
        """Answers of the mixture and, with `agreement`, of every draw."""
        inputs = asked.batch()
        with self.mixed() as steps:
            output = self.run(inputs)
        before = steps[0].tokens if self.encodes else inputs["input_ids"].shape[1]
        if not self.encodes and (chunk := self.setting("prefill_chunk_size")):
            steps = steps[math.ceil(before / chunk) - 1 :]
        chosen = output.sequences[:, before:].cpu()
        count = len(asked.rows)
        answers = self.alone(asked, before) if agreement else [()] * count
        beams = getattr(output, "beam_indices", None)
        per_prompt = len(chosen) // count
        results = []
        for row, tokens in enumerate(chosen):
            if beams is None:
                path = torch.full((len(steps),), row)
            else:
                path = beams[row].cpu().long()
                tokens = tokens[: int((path >= 0).sum())]
            tokens = tokens[: self.length(tokens)]
            question = row // per_prompt
            results.append(
                self.generation(asked.prompts[question], tokens, steps, path, answers[question])
            )
        return results

    def generation(
        self,
        prompt: Prompt,
        tokens: Tensor,
        steps: list[Step],
        path: Tensor,
        answers: tuple[str, ...],
    ) -> Generation:
        """An answer's record; `path` (T,) is the row that each step's token came from."""
        rows = list(zip(steps, path.tolist(), strict=False))[: len(tokens)]
        pieces = Pieces(self.tokenizer)
        return Generation(
            prompt=prompt,
            text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
            tokens=tokens,
            pieces=tuple(pieces.add(token) for token in tokens.tolist()),
            token_log_probs=torch.stack(
                [s.log_probs[row, token] for (s, row), token in zip(rows, tokens, strict=True)]
            ),
            total_uncertainty=torch.stack([step.total[row] for step, row in rows]),
            aleatoric_uncertainty=torch.stack([step.aleatoric[row] for step, row in rows]),
            log_probs=torch.stack([step.log_probs[row] for step, row in rows])
            if self.setting("output_logits")
            else None,
            answers=answers,
        )

    def alone(self, asked: Inputs, before: int) -> list[tuple[str, ...]]:
        """Every draw's own answer to every prompt; `before` tokens stand in front of it."""
        inputs = asked.batch(self.draws.num_draws)
        output = self.run(inputs, num_return_sequences=1, output_logits=False)
        chosen = output.sequences[:, before:]
        texts = self.tokenizer.batch_decode(chosen, skip_special_tokens=True)
        count = len(asked.rows)
        return [tuple(texts[i::count]) for i in range(count)]

    def run(self, inputs: dict[str, Any], **options: Any) -> Any:
        """`transformers.generate` under the draws, in evaluation mode.

        Raises:
            BaraError: `generate` refuses an option, or logits are not finite.
        """
        if self.setting("stop_strings"):
            options["tokenizer"] = self.tokenizer  # to find them in
        drawing = self.source.drawing(None if self.mean else self.draws) if self.source else None
        try:
            with evaluating(self.model), whole_rows(self.model), drawing or nullcontext():
                return self.model.generate(
                    **to_device(inputs, next(self.model.parameters()).device),
                    **{**self.options, **options, "return_dict_in_generate": True},
                )
        except BaraError:
            raise
        except (ValueError, TypeError) as error:  # what generate says of its options
            raise BaraError(f"generate: {first_line(error)}") from error

    def length(self, tokens: Tensor) -> int:
        """Tokens up to the end-of-text token, or to the padding behind a shorter answer."""
        ends = torch.isin(tokens, torch.tensor(sorted(self.ends)).to(tokens))
        if ends.any():
            return int(ends.int().argmax()) + 1
        if not any(self.setting(name) for name in ("stop_strings", "stopping_criteria")):
            return len(tokens)
        padding = self.options["pad_token_id"]
        filled = tokens.ne(-1 if padding is None else padding).nonzero()
        return int(filled.max()) + 1 if len(filled) else 1

    @contextmanager
    def mixed(self) -> Iterator[list[Step]]:
        """Calls of the model inside take n rows and return the mixture's n distributions.

        The rows are repeated for the S draws on the way in, and their probabilities averaged on the
        way out, as logits with the mean of the draws' normalisers; the cache holds S n rows. So
        every decoding strategy sees one model, and with one draw exactly its logits. What an
        encoder made has S n rows too.

        Yields:
            The list that every call's last position is added to.
        """
        root = base_of(self.model)
        blocks = Blocks(self.draws.num_draws)
        count, steps = blocks.num_draws, list[Step]()
        decoder_ids = "decoder_input_ids" if self.encodes else "input_ids"
        inside = False  # a call of the whole model, whose inputs are repeated already

        @of_this_thread  # other threads may predict with the model meanwhile
        def repeat(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal inside
            inside = True
            encoded = {k: kwargs[k] for k in ("encoder_outputs",) if k in kwargs}
            return args, blocks.repeat(kwargs, kwargs[decoder_ids].shape[0]) | encoded

        @of_this_thread
        def repeat_source(
            _: Any, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]] | None:
            if inside:
                return None
            return args, blocks.repeat(kwargs, kwargs[root.main_input_name].shape[0])

        @of_this_thread
        def mix(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            nonlocal inside
            inside = False
            logits = blocks.split(require_finite(output.logits.float()))
            level = logits.logsumexp(-1, keepdim=True)
            # as high as the draws' logits: repetition_penalty, for one, depends on it
            output.logits = log_mean_exp(logits - (level - level.mean(0)))
            if self.encodes and "encoder_outputs" not in kwargs:
                return  # Whisper finds out the language
            draws = logits[:, :, -1].log_softmax(-1)
            last = log_mean_exp(draws)
            total, aleatoric = entropy(last).cpu(), entropy(draws).mean(0).cpu()
            steps.append(Step(last.cpu(), total, aleatoric, kwargs[decoder_ids].shape[1]))

        def reorder(cache: Any, beams: Tensor) -> Any:
            offsets = torch.arange(count, device=beams.device).unsqueeze(1) * len(beams)
            cache.reorder_cache((beams + offsets).flatten())
            return cache

        handles = [
            root.register_forward_pre_hook(repeat, with_kwargs=True, prepend=True),
            root.register_forward_hook(mix, with_kwargs=True),
        ]
        if self.encodes:
            hook = root.get_encoder().register_forward_pre_hook
            handles.append(hook(repeat_source, with_kwargs=True, prepend=True))
        root.__dict__["_reorder_cache"] = reorder  # where beam search looks before the cache's own
        try:
            yield steps
        finally:
            root.__dict__.pop("_reorder_cache")
            for handle in handles:
                handle.remove()


@contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """The output layer is given contiguous hidden states inside.

    After a prompt transformers hands it the view `hidden[:, -1:]`, which PyTorch multiplies by a
    copy of the layer's weights for each row: with 128 rows in bfloat16 that took a CPU longer than
    all other steps together.
    """
    head = base_of(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last dimension, nats."""
    return torch.special.entr(log_probs.exp()).sum(-1)


class Pieces:
    """The text that each token adds; a character of several tokens comes with its last one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generators start from a seed inside, and are as they were afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
