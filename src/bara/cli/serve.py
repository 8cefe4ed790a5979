"""`bara serve`: adapters behind an API."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from bara.cli.options import BaseModel

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    adapters: Annotated[
        list[str],
        Argument(metavar="ADAPTER...", help="Folders that `bara train` wrote, or NAME=FOLDER."),
    ],
    host: Annotated[
        str, Option(help="Address to listen on; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None, Option(help="File with the key that clients have to send.")
    ] = None,
    max_body: Annotated[int, Option(min=1, help="Bytes of a request.")] = 2**20,
    max_texts: Annotated[int, Option(min=1, help="Texts or prompts of a request.")] = 64,
    max_tokens: Annotated[int, Option(min=1, help="New tokens of an answer.")] = 1024,
    max_draws: Annotated[int, Option(min=1, help="Draws of a request.")] = 64,
    max_queue: Annotated[int, Option(min=1, help="Requests that wait; others get 503.")] = 128,
    batch_size: Annotated[int, Option(min=1, help="Texts times draws in one pass.")] = 256,
    load_from: Annotated[
        Path | None,
        Option(
            help="Folder from which clients with the key may load adapters while it runs.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    max_adapters: Annotated[int, Option(min=1, help="Adapters that clients have loaded.")] = 64,
    timeout: Annotated[float, Option(min=0.1, help="Seconds of a request.")] = 60.0,
    base_model: BaseModel = None,
) -> None:
    """Answer over HTTP: predictions, OpenAI's API for language models, a page for people."""
    from bara.errors import BaraError

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise BaraError(f"`bara serve` needs {package}: pip install 'bara-peft[serve]'")
    from bara.machine import quieten_libraries
    from bara.serving.app import create_app
    from bara.serving.limits import Limits
    from bara.serving.served import load_served
    from bara.serving.server import listen, read_key, run

    quieten_libraries()
    key = None if api_key_file is None else read_key(api_key_file)
    if load_from is not None and key is None:
        raise BaraError("--load-from lets clients load adapters: give --api-key-file too")
    limits = Limits(
        body=max_body,
        texts=max_texts,
        tokens=max_tokens,
        draws=max_draws,
        queue=max_queue,
        rows=batch_size,
        seconds=timeout,
        adapters=max_adapters,
    )
    with listen(host, port) as listener:
        served = load_served(adapters, base_model=base_model)
        if host not in LOOPBACK and key is None:
            print("bara: anybody who reaches this can ask: see --api-key-file", file=sys.stderr)
        names = ", ".join(one.name for one in served)
        print(f"bara: {names} on http://{host}:{port}", file=sys.stderr, flush=True)
        app = create_app(
            served, limits=limits, api_key=key, load_from=load_from, base_model=base_model
        )
        run(app, listener=listener, limits=limits)
