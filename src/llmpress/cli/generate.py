"""``llmpress generate``: talk to a model, compressed or not."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpress.cli.options import AsJson, Device, Model, Seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; - reads stdin.")] = None,
    delta: Annotated[
        Path | None, typer.Option(help="A compressed delta to put on the model first.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most probable token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from this share of probability.")
    ] = 1.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, if not the model's.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt and print the tokens as they come."""
    import time

    import torch
    from transformers import TextStreamer

    from llmpress import fetch_model, load_delta, load_model, load_tokenizer
    from llmpress.cli.options import quiet
    from llmpress.cli.output import print_json
    from llmpress.core.devices import pick_device, pick_dtype
    from llmpress.core.errors import ConfigError
    from llmpress.models.generation import plain_generation

    quiet()
    text = _prompt(prompt)
    precision, place = pick_dtype(dtype), pick_device(device)
    folder = fetch_model(model)
    tools = load_tokenizer(tokenizer or folder)
    ids = _encode(tools, text, chat, system)
    loaded: Any = load_model(folder, dtype=precision, device=str(place))
    if delta is not None:
        loaded = load_delta(loaded, delta)
    plain_generation(loaded, "stop_strings")
    if not ids:
        raise ConfigError("generate: the prompt gives no token; say more")
    _check_length(loaded.config, len(ids), max_tokens)
    padding = tools.eos_token_id if tools.pad_token_id is None else tools.pad_token_id
    streamer: Any = TextStreamer(tools, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        output = loaded.generate(
            torch.tensor([ids], device=place),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=place),
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=top_p if temperature > 0 else None,
            top_k=None,
            pad_token_id=padding,
            streamer=None if as_json else streamer,
            tokenizer=tools,
        )
    seconds = time.perf_counter() - started
    new = output[0, len(ids) :]
    if as_json:
        print_json(
            {
                "prompt": text,
                "text": tools.decode(new, skip_special_tokens=True),
                "prompt_tokens": len(ids),
                "new_tokens": len(new),
                "seconds": round(seconds, 3),
                "tokens_per_second": round(len(new) / seconds, 2),
            }
        )


def _prompt(prompt: str | None) -> str:
    from llmpress.core.errors import ConfigError

    if prompt is None and sys.stdin.isatty():
        raise ConfigError("generate: give a prompt, or pipe one in")
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise ConfigError("generate: the prompt is empty")
    return text


def _encode(
    tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool | None, system: str | None
) -> list[int]:
    from llmpress.core.errors import ConfigError, SourceError
    from llmpress.data.chats import chat_text

    has_template = tokenizer.chat_template is not None
    if chat and not has_template:
        raise ConfigError("--chat: this tokenizer has no chat template; leave --chat out")
    if chat is None:
        chat = has_template
    if system and not chat:
        raise ConfigError("--system: only a chat has a system message; use --chat")
    if not chat:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids
    messages = [{"role": "user", "content": text}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        rendered = chat_text(tokenizer, messages, answer=True)
    except SourceError as error:
        advice = "--system is more than it takes: leave it out, or use" if system else "use"
        raise ConfigError(f"--chat: {error}; {advice} --no-chat") from None
    rendered_ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    return rendered_ids


def _check_length(config: Any, prompt_tokens: int, max_tokens: int) -> None:
    from llmpress.core.errors import ConfigError

    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_tokens + max_tokens > context:
        room = context - prompt_tokens
        remedy = f"lower --max-tokens to {room}" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens and {max_tokens} new ones exceed the model's "
            f"context of {context}: {remedy}"
        )
