"""Answers in OpenAI's words: whole or as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    get_response_template,
    response_events_to_chunks,
)
from transformers.utils.chat_parsing import ResponseParser

from llmpress.serving.engine import Answer, Piece
from llmpress.serving.sampling import Chosen

DONE = "data: [DONE]\n\n"
Json = dict[str, Any]


def event(data: Json) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece]]:
    """Yield the pieces of several answers as they come, with their answer's number.

    Raises:
        TimeoutError: One took too long; all are cancelled then.
        WorkerDiedError: One was not finished.
    """
    pieces: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def read(number: int, answer: Answer) -> None:
        try:
            async with aclosing(answer.pieces()) as parts:
                async for piece in parts:
                    pieces.put_nowait((number, piece))
        except Exception as error:  # noqa: BLE001 - raised below, where it is waited for
            pieces.put_nowait((number, error))
        else:
            pieces.put_nowait((number, None))

    tasks = [asyncio.create_task(read(*numbered)) for numbered in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            number, piece = await pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        for answer in answers:
            answer.cancel()


class Completion:
    """Plain completions of one request.

    Args:
        model: The name in the request.
        tokenizer: The tenant's.
    """

    object = whole = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def body(self, choices: list[Json], *, part: bool, usage: Json | None = None) -> Json:
        """Return an answer, or a part of one."""
        answer: Json = {
            "id": self.name,
            "object": self.object if part else self.whole,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return answer if usage is None else answer | {"usage": usage}

    def first(self, number: int) -> list[Json]:
        """Return what a stream begins with."""
        del number
        return []

    def parts(self, number: int, piece: Piece) -> list[Json]:
        """Return the choices that a piece makes."""
        choice = {"index": number, "text": piece.text, "logprobs": self._logprobs(piece.chosen)}
        return [choice | {"finish_reason": piece.finish_reason}]

    def joined(self, number: int, parts: Sequence[Json]) -> Json:
        """Return a whole choice of its parts."""
        found = [part["logprobs"] for part in parts if part["logprobs"]]
        logprobs = (
            {key: [v for each in found for v in each[key]] for key in found[0]} if found else None
        )
        return {
            "index": number,
            "text": "".join(part["text"] for part in parts),
            "logprobs": logprobs,
            "finish_reason": parts[-1]["finish_reason"],
        }

    def _logprobs(self, chosen: Sequence[Chosen]) -> Json | None:
        if not chosen:
            return None
        return {
            "tokens": [self.token(each.token) for each in chosen],
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": [{self.token(t): p for t, p in each.top} for each in chosen],
        }

    def token(self, token: int) -> str:
        """Return the text of a token alone."""
        return str(self.tokenizer.decode([token]))


class Chat(Completion):
    """Messages of an assistant.

    Args:
        model: The name in the request.
        tokenizer: The tenant's.
        template: How its answers are told apart into text, reasoning and calls; None for text.
        prompt: Tokens of the chat.
        tools: Of the request.
        count: Of answers.
    """

    object, whole = "chat.completion.chunk", "chat.completion"
    prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        template: Json | None,
        prompt: Sequence[int],
        tools: list[Json] | None,
        count: int,
    ) -> None:
        super().__init__(model, tokenizer)
        self._calls = [0] * count
        self._parsers: list[Any] = [None] * count
        if template is not None:
            before = str(tokenizer.decode(list(prompt)))
            callable_tools: Any = tools
            self._parsers = [
                ResponseParser(template, prefix=before, tools=callable_tools) for _ in range(count)
            ]

    def first(self, number: int) -> list[Json]:
        """Return what a stream begins with: whose message it is."""
        parser = self._parsers[number]
        deltas = self._deltas(number, [] if parser is None else parser.initial_events)
        role = {"role": "assistant", "content": ""}
        return [_choice(number, delta) for delta in [role, *deltas]]

    def parts(self, number: int, piece: Piece) -> list[Json]:
        """Return the choices that a piece makes."""
        parser = self._parsers[number]
        deltas: list[Json] = []
        if parser is None:
            deltas = [{"content": piece.text}] if piece.text else []
        else:
            events = list(parser.feed(piece.text))
            if piece.finish_reason is not None:
                events += _end_of(parser)
            deltas = self._deltas(number, events)
        if piece.finish_reason is None and not deltas and not piece.chosen:
            return []
        choices = [_choice(number, delta) for delta in deltas or [{}]]
        choices[-1]["logprobs"] = self._logprobs(piece.chosen)
        if (reason := piece.finish_reason) is not None:
            called = self._calls[number] and reason == "stop"
            choices[-1]["finish_reason"] = "tool_calls" if called else reason
        return choices

    def joined(self, number: int, parts: Sequence[Json]) -> Json:
        """Return a whole choice of its parts."""
        deltas = [part["delta"] for part in parts]
        calls = [
            {key: value for key, value in call.items() if key != "index"}
            for delta in deltas
            for call in delta.get("tool_calls", ())
        ]
        text = "".join(delta.get("content") or "" for delta in deltas)
        message: Json = {"role": "assistant", "content": None if calls and not text else text}
        if reasoning := "".join(delta.get("reasoning_content", "") for delta in deltas):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        content = [
            each for part in parts if part["logprobs"] for each in part["logprobs"]["content"]
        ]
        return {
            "index": number,
            "message": message,
            "logprobs": {"content": content} if content else None,
            "finish_reason": parts[-1]["finish_reason"],
        }

    def _deltas(self, number: int, events: Iterable[Json]) -> list[Json]:
        deltas: list[Json] = []
        for item in response_events_to_chunks(list(events)):
            if isinstance(item, ToolCall):
                call: Json = {
                    "index": self._calls[number],
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": item.name, "arguments": item.arguments},
                }
                self._calls[number] += 1
                deltas.append({"tool_calls": [call]})
            else:
                is_thought = isinstance(item, ReasoningText)
                deltas.append({"reasoning_content" if is_thought else "content": str(item)})
        return deltas

    def _logprobs(self, chosen: Sequence[Chosen]) -> Json | None:
        if not chosen:
            return None
        return {
            "content": [
                self._entry(each.token, each.logprob)
                | {"top_logprobs": [self._entry(t, p) for t, p in each.top]}
                for each in chosen
            ]
        }

    def _entry(self, token: int, logprob: float) -> Json:
        text = self.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _choice(number: int, delta: Json) -> Json:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}


def _end_of(parser: Any) -> list[Json]:
    try:
        return list(parser.finalize()[1])
    except (ValueError, RuntimeError):  # it ended inside a call
        return []


def response_template(tokenizer: PreTrainedTokenizerBase, model: Any) -> Json | None:
    """Return how transformers tells a model's text, reasoning and calls apart; None if unknown."""
    found: Json | None = get_response_template(tokenizer, model)
    return found
