"""``llmpress serve``: a model and its tenants over HTTP, as OpenAI's clients ask."""

from pathlib import Path
from typing import Annotated

import typer

from llmpress.cli.options import Device, Model


def serve(
    model: Model,
    delta: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SOURCE",
            help="A tenant's compressed delta: a folder, hub:owner/name@revision, or "
            "dvc:PATH@REMOTE; repeatable.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LLMPRESS_API_KEY", help="What requests have to carry; better not typed."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the base in requests.")] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A tenant's own tokenizer; repeatable."),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests computed at once.")] = 32,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that wait; more are refused with 429.")
    ] = 128,
    cache_tokens: Annotated[
        int, typer.Option(min=64, help="Tokens of all requests whose keys and values are kept.")
    ] = 16384,
    batch_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens computed at once; longer prompts go in parts.")
    ] = 512,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600,
    grace: Annotated[
        int, typer.Option(min=0, help="Seconds that running requests have after SIGTERM.")
    ] = 60,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Device = None,
) -> None:
    """Serve a model, and a delta on it for each tenant, until SIGTERM or Ctrl-C."""
    from llmpress.cli.options import quiet
    from llmpress.core.devices import pick_device, pick_dtype
    from llmpress.serving.engine import Limits
    from llmpress.serving.server import build_engine, listening_socket
    from llmpress.serving.server import serve as run

    quiet()
    deltas = [_named("--delta", text) for text in delta or ()]
    tokenizers = {key: Path(value) for key, value in map(_tokenizer, tokenizer or ())}
    precision, place = pick_dtype(dtype), pick_device(device)
    with listening_socket(host, port) as listener:
        limits = Limits(max_requests, max_waiting, cache_tokens, batch_tokens, timeout)
        engine = build_engine(
            model,
            deltas,
            name=name,
            tokenizers=tokenizers,
            dtype=precision,
            device=str(place),
            limits=limits,
        )
        run(engine, listener, api_key=api_key or None, grace=grace)


def _tokenizer(text: str) -> tuple[str, str]:
    return _named("--tokenizer", text)


def _named(option: str, text: str) -> tuple[str, str]:
    from llmpress.core.errors import ConfigError

    name, separator, value = text.partition("=")
    if not (separator and name and value):
        raise ConfigError(f"{option} {text!r}: write NAME=SOURCE, such as sums=deltas/sums")
    return name, value
