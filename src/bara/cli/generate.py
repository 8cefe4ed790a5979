"""`bara generate`: text with an uncertainty on every token."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from typer import Argument, Option

from bara.cli.options import (
    AbstainAtRisk,
    Adapter,
    BaseModel,
    GenerateOptions,
    MaxNewTokens,
    NumDraws,
)
from bara.cli.terminal import console, row_count, say_calibrate, say_next
from bara.schema import SEEDS, json_text

CHUNK = 8
"""Prompts that are read, answered and written at a time."""


def generate(
    adapter: Adapter,
    prompt: Annotated[str | None, Argument(help="What to go on from; none starts a chat.")] = None,
    data: Annotated[
        str | None,
        Option(help="Table with `prompt` or `messages`; - reads JSONL from standard input."),
    ] = None,
    output: Annotated[str, Option(help="JSONL file; - is standard output.")] = "-",
    chat: Annotated[
        bool, Option("--chat", help="Put the prompt into the chat template, as a user's message.")
    ] = False,
    num_draws: NumDraws = 8,
    seed: Annotated[
        int, Option(min=0, max=SEEDS - 1, help="Seed of the draws and of sampling.")
    ] = 0,
    batch_size: Annotated[
        int, Option(min=1, max=1_000_000, help="Prompts times draws decoded at a time.")
    ] = 64,
    max_new_tokens: MaxNewTokens = None,
    options: GenerateOptions = None,
    agreement: Annotated[
        bool, Option(help="Also let every draw answer on its own, in JSON output.")
    ] = True,
    abstain_at_risk: AbstainAtRisk = None,
    base_model: BaseModel = None,
) -> None:
    """Generate text; on a terminal uncertain tokens are shaded, in a pipe it is JSONL."""
    from tqdm.auto import tqdm

    from bara.data.tables import chunked
    from bara.errors import BaraError
    from bara.evaluation.abstention import load_threshold
    from bara.finetuning.load import load_adapter
    from bara.machine import quieten_libraries

    quieten_libraries()
    if prompt is not None and data is not None:
        raise BaraError("give a prompt or --data, not both")
    decoding = decoding_options(max_new_tokens, options)
    settings = {"num_draws": num_draws, "seed": seed, **decoding}
    talks = prompt is None and data is None and sys.stdin.isatty()
    if talks and output != "-":
        raise BaraError("--output is for answers to a prompt or --data: give one of them")
    threshold = None
    if abstain_at_risk is not None:
        conditions: dict[str, Any] = {"measure": "answers", "num_draws": num_draws, "seed": seed}
        if chat or talks:
            conditions["chat"] = True
        threshold = load_threshold(adapter, abstain_at_risk, **conditions, decoding=decoding)
    rows = None if talks else _rows(prompt, data)
    model, tokenizer, _ = load_adapter(adapter, base_model=base_model)
    if rows is None:
        _talk(model, tokenizer, settings, threshold)
        return
    if prompt is not None and output == "-" and sys.stdout.isatty():
        asked = [{"role": "user", "content": prompt}] if chat else prompt
        _show(model, tokenizer, asked, settings, threshold)
        return
    settings |= {"batch_size": batch_size, "agreement": agreement}
    total = row_count(rows, data)
    with tqdm(desc="answering", unit="prompt", total=total, disable=None) as bar:
        chunks = chunked(_asked(rows, chat), CHUNK)
        _write(output, _answers(model, tokenizer, chunks, settings, threshold, bar))
    if output != "-":
        print(f"The answers are in {output}.")
        if threshold is None:
            say_calibrate(adapter)
        else:
            say_next(["bara", "serve", adapter])


def decoding_options(max_new_tokens: int | None, options: list[str] | None) -> dict[str, Any]:
    """What --max-new-tokens and --set say, as options of `bara.generate`.

    Raises:
        BaraError: both say `max_new_tokens`, or --set is no NAME=VALUE.
    """
    from bara.cli.train import parse_options
    from bara.errors import BaraError

    given = parse_options(options or [])
    if max_new_tokens is None:
        return given
    if "max_new_tokens" in given:
        raise BaraError("give --max-new-tokens or --set max_new_tokens, not both")
    return {"max_new_tokens": max_new_tokens} | given


def _rows(prompt: str | None, data: str | None) -> Iterable[Any]:
    from bara.data.tables import load_table, read_jsonl

    if prompt is not None:
        return [{"prompt": prompt}]
    if data is None or data == "-":
        return read_jsonl(sys.stdin, "standard input")
    return load_table(data)


def _asked(rows: Iterable[Any], chat: bool) -> Iterator[dict[str, Any]]:
    """The rows; with --chat a prompt is a user's message."""
    for row in rows:
        if chat and not row.get("messages"):
            row = {"messages": [{"role": "user", "content": row.get("prompt")}]}
        yield row


def _answers(
    model: Any, tokenizer: Any, chunks: Any, settings: dict[str, Any], threshold: Any, bar: Any
) -> Iterator[str]:
    from bara.language.generation import generate as generate_answers
    from bara.language.tasks import row_prompt

    done = 0
    for chunk in chunks:
        prompts = [row_prompt(row, f"row {done + i}") for i, row in enumerate(chunk, start=1)]
        for answer in generate_answers(model, tokenizer, prompts, progress=False, **settings):
            record = answer.to_record()
            if threshold is not None:
                record["abstained"] = bool(threshold.abstains(answer.uncertainty))
                if record["abstained"]:
                    record |= {"text": None, "answers": None}
                    for token in record["tokens"]:
                        token["text"] = None
            yield json_text(record, ensure_ascii=False) + "\n"
        done += len(chunk)
        bar.update(len(chunk))


def _write(output: str, lines: Iterator[str]) -> None:
    from bara.files import atomic_write_text

    if output != "-":
        atomic_write_text(output, "".join(lines))
        return
    for line in lines:
        sys.stdout.write(line)
        sys.stdout.flush()


def _show(model: Any, tokenizer: Any, prompt: Any, settings: dict[str, Any], threshold: Any) -> str:
    """Streams an answer to the terminal, each token shaded by its uncertainty; returns it."""
    import math

    from rich.text import Text

    from bara.language.streaming import generate_stream

    terminal = console()
    tokens = []
    for token in generate_stream(model, tokenizer, prompt, **settings):
        tokens.append(token)
        terminal.print(Text(token.text, style=shade(token.total)), end="", soft_wrap=True)
    uncertainty = 1 - math.exp(sum(token.log_prob for token in tokens) / len(tokens))
    epistemic = sum(token.epistemic for token in tokens) / len(tokens)
    terminal.print()
    terminal.print(f"uncertainty {uncertainty:.2f}, epistemic {epistemic:.3f} nats", style="dim")
    if threshold is not None and threshold.abstains(uncertainty):
        terminal.print("Too uncertain for the wanted risk: take this as no answer.", style="bold")
    return "".join(token.text for token in tokens)


def shade(entropy: float) -> str:
    """A style for a token: from none at 0 nats to red at 3 nats and more."""
    level = min(1.0, entropy / 3)
    if level < 0.1:
        return ""
    return f"on rgb({int(60 + 150 * level)},{int(60 - 30 * level)},{int(60 - 30 * level)})"


def _talk(model: Any, tokenizer: Any, settings: dict[str, Any], threshold: Any) -> None:
    """A conversation in the terminal, until an empty line or the end of input."""
    from rich.text import Text

    from bara.errors import BaraError
    from bara.language.prompts import render_chat

    terminal = console()
    messages: list[dict[str, str]] = []
    render_chat(tokenizer, [{"role": "user", "content": "?"}])  # refuses without a template
    terminal.print("An empty line ends the conversation.", style="dim")
    while True:
        try:
            question = terminal.input(Text("> ", style="bold")).strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        try:
            answer = _show(model, tokenizer, messages, settings, threshold)
        except BaraError as error:  # as when the conversation outgrows the context
            terminal.print(f"{error} The question is taken back.", style="bold")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})
