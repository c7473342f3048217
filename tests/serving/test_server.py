"""A server's answers, asked by OpenAI's own client, against those of `generate`."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
from conftest import Served

import llmpress

Expected = Callable[[str, str, int], str]
PROMPTS = ["import asyncio\n\nclass Server", "def main():", "The value of the", "return"]
NAMES = ["base", "tuned", "grown", "untied", "biased"]


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
def test_each_tenant_alone_says_what_generate_says(
    client: openai.OpenAI, expected: Expected, name: str
) -> None:
    for prompt in PROMPTS[:2]:
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected(name, prompt, 12)
        assert answer.model == name
        assert answer.choices[0].finish_reason == "length"


def test_tenants_of_one_batch_say_what_generate_says_to_each(
    server: Served, expected: Expected
) -> None:
    asked = [(name, prompt, 5 + 3 * n) for n, prompt in enumerate(PROMPTS) for name in NAMES]
    asked += [("tuned", " ".join(PROMPTS) * 9, 9), ("biased", " ".join(PROMPTS) * 9, 9)]

    async def ask(
        client: openai.AsyncOpenAI, place: int, name: str, prompt: str, tokens: int
    ) -> str:
        await asyncio.sleep(0.02 * place)
        options = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        if place % 2:
            answer = await client.completions.create(**options)
            return answer.choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([part.choices[0].text async for part in stream])

    async def ask_all() -> list[str]:
        async with server.client_of_many() as client:
            return await asyncio.gather(*(ask(client, *each) for each in numbered))

    numbered = [(place, *each) for place, each in enumerate(asked)]
    assert asyncio.run(ask_all()) == [expected(*each) for each in asked]


def test_every_tenant_is_a_model(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == NAMES
    assert client.models.retrieve("grown").id == "grown"


def test_a_stream_is_the_answer_in_parts(client: openai.OpenAI, expected: Expected) -> None:
    parts = list(
        client.completions.create(
            model="tuned",
            prompt=PROMPTS[0],
            max_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(p.choices[0].text for p in parts if p.choices) == expected(
        "tuned", PROMPTS[0], 10
    )
    assert sum(bool(p.choices and p.choices[0].text) for p in parts) > 3
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    assert (parts[-1].choices, parts[-1].usage.completion_tokens) == ([], 10)
    assert len({part.id for part in parts}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(
    client: openai.OpenAI, expected: Expected, server: Served, stream: bool
) -> None:
    whole = expected("biased", PROMPTS[0], 24)
    stop = whole[8:11]
    options = {"model": "biased", "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
    options |= {"stop": ["never found", stop], "stream": stream}
    answer = client.completions.create(**options)
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"
    server.idle()


def test_log_probabilities_are_the_models(
    client: openai.OpenAI, tiny_model_folder: Path, deltas: dict[str, Path]
) -> None:
    model = llmpress.load_finetuned(tiny_model_folder, deltas["tuned"])
    tokenizer = llmpress.load_tokenizer(tiny_model_folder)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    options = {"model": "tuned", "max_tokens": 3, "temperature": 0}
    plain = client.completions.create(prompt=PROMPTS[1], logprobs=2, **options).choices[0]
    for place, value in enumerate(plain.logprobs.token_logprobs):
        with torch.no_grad():
            found = model(ids).logits[0, -1].log_softmax(-1)
        best = found.topk(2)
        torch.testing.assert_close(torch.tensor(value), best.values[0], rtol=1e-3, atol=1e-3)
        top = plain.logprobs.top_logprobs[place]
        assert list(top) == [tokenizer.decode([token]) for token in best.indices]
        assert plain.logprobs.tokens[place] == tokenizer.decode([best.indices[0]])
        ids = torch.cat([ids, best.indices[:1, None]], dim=1)
    plain = client.completions.create(prompt=PROMPTS[1], **options).choices[0]
    assert plain.logprobs is None


def test_a_seed_draws_what_generate_draws(client: openai.OpenAI, tiny_model_folder: Path) -> None:
    model = llmpress.load_model(tiny_model_folder)
    tokenizer = llmpress.load_tokenizer(tiny_model_folder)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    torch.manual_seed(5)
    drawn = model.generate(
        ids, max_new_tokens=12, do_sample=True, temperature=1.3, top_p=0.8, top_k=None
    )
    options = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 12}
    options |= {"temperature": 1.3, "top_p": 0.8}
    answer = client.completions.create(**options, seed=5, n=2)
    assert answer.choices[0].text == tokenizer.decode(drawn[0, ids.shape[1] :])
    assert answer.choices[1].text != answer.choices[0].text
    again = client.completions.create(**options, seed=6)
    assert again.choices[0].text == answer.choices[1].text
    free = {client.completions.create(**options).choices[0].text for _ in range(4)}
    assert len(free) > 1


def test_prompts_may_be_several_and_tokens(client: openai.OpenAI, expected: Expected) -> None:
    answer = client.completions.create(
        model="grown", prompt=PROMPTS[:3], max_tokens=6, temperature=0
    )
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.text for c in answer.choices] == [expected("grown", p, 6) for p in PROMPTS[:3]]
    assert answer.usage.completion_tokens == 18
    grown = client.completions.create(model="grown", prompt=[[513, 3]], max_tokens=2)
    assert grown.usage.prompt_tokens == 2
    with pytest.raises(openai.BadRequestError, match="513"):
        client.completions.create(model="tuned", prompt=[513, 3], max_tokens=2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_goes_through_the_template(
    client: openai.OpenAI, expected: Expected, stream: bool
) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    options = {
        "model": "base",
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "x = 1"}]},
        ],
        "max_completion_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": stream,
    }
    prompt = "system: be\nuser: x = 1\nassistant:"
    for given, before in (({}, ""), ({"tools": tools}, "def look_up\n")):
        answer = client.chat.completions.create(**options, **given)
        if stream:
            parts = [part.choices[0] for part in answer]
            assert parts[0].delta.role == "assistant"
            text = "".join(part.delta.content or "" for part in parts)
            logprobs = [e for part in parts if part.logprobs for e in part.logprobs.content]
        else:
            text = answer.choices[0].message.content
            logprobs = answer.choices[0].logprobs.content
            assert answer.object == "chat.completion"
        assert text == expected("base", before + prompt, 8)
        assert "".join(entry.token for entry in logprobs) == text
        assert all(len(entry.top_logprobs) == 2 for entry in logprobs)


@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        ("completions", {"model": "tund", "prompt": "x"}, 404, "tund"),
        ("completions", {"model": "base"}, 400, "prompt"),
        ("completions", {"model": "base", "prompt": "x" * 9000}, 400, "512 tokens"),
        ("completions", {"model": "base", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"model": "base", "prompt": "x", "max_tokens": 512}, 400, "512"),
        ("completions", {"model": "base", "prompt": "x", "temperature": 3}, 400, "temperature"),
        ("completions", {"model": "base", "prompt": "x", "echo": True}, 400, "echo"),
        ("completions", {"model": "base", "prompt": "x", "stop": [""]}, 400, "stop"),
        ("completions", {"model": "base", "prompt": ""}, 400, "no token"),
        ("completions", {"model": "base", "prompt": [[]]}, 400, "no token"),
        ("completions", {"model": "base", "prompt": [-1]}, 400, "-1"),
        (
            "completions",
            {"model": "base", "prompt": "x", "logit_bias": {"3": 9}},
            400,
            "logit_bias",
        ),
        ("completions", [1], 400, ""),
        ("chat/completions", {"model": "base", "messages": []}, 400, "messages"),
        ("chat/completions", {"model": "base", "messages": [{}]}, 400, "messages"),
        (
            "chat/completions",
            {"model": "base", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            400,
            "logprobs",
        ),
        ("nowhere", {}, 404, ""),
        ("load_delta", {"name": "a", "source": "b"}, 403, "API key"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_named(
    server: Served, path: str, body: object, status: int, names: str
) -> None:
    answer = server.post(f"/v1/{path}", body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert names in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    malformed = server.post("/v1/completions", None, headers={"content-type": "application/json"})
    assert malformed.status_code == 400
    server.idle()


def test_what_neither_helps_nor_harms_is_taken(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="base",
        prompt="x",
        max_tokens=1,
        user="somebody",
        presence_penalty=0,
        echo=False,
        best_of=1,
        extra_body={"top_k": 3},
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 1
