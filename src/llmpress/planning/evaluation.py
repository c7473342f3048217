"""What an evaluation needs, as a function of shapes and settings."""

from collections.abc import Mapping

import torch

from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.base import Work
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import sizes
from llmpress.planning.estimates import (
    EVALUATION_PACKAGES_BYTES,
    EVALUATION_STARTUP_SECONDS,
    PASS_BYTES,
    Estimate,
    TaskText,
    layer_bytes,
    num_features,
)
from llmpress.planning.shapes import ModelShapes

SCORED_REQUESTS = 16  # of one batch of lm-eval

LOGIT_CHUNK = 128


def evaluate(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    layers: Mapping[str, CompressedLinear | None] | None = None,
    *,
    delta: bool = False,
) -> Estimate:
    """The model and the original whole, the logits of one window; tasks in their own dtype.

    Args:
        model: The original.
        settings: How.
        texts: Tokens of each task's items, by task.
        layers: Compressed layers of what is evaluated; None for the original itself.
        delta: Whether the layers are a delta that lies on a dense base.
    """
    item = getattr(torch, settings.dtype).itemsize
    task_item = getattr(torch, settings.task_dtype).itemsize
    whole = item * model.num_weights
    packed = 0 if layers is None else sum(layer_bytes(layer) for layer in layers.values())
    if delta:
        # a dense layer replaces base and delta one by one; the base's file stays mapped
        models = 2 * whole + item * model.linear_weights + packed
    else:
        models = (1 if layers is None else 2) * whole + packed
    logits = settings.length * model.vocabulary * item * (1 if layers is None else 2)
    chunk = 4 * LOGIT_CHUNK * model.vocabulary * (2 if layers is None else 6)
    likelihood = models + logits + chunk
    used = [texts.get(name, TaskText()) for name in settings.tasks]
    longest = max((text.longest_tokens for text in used), default=0.0)
    scores = int(SCORED_REQUESTS * longest * model.vocabulary * (task_item + 8))
    converting = (item + task_item) * model.num_weights
    device = max(likelihood, converting, task_item * model.num_weights + scores)
    work = _evaluation_work(model, settings, texts, layers, delta=delta)
    return Estimate(
        host_bytes=EVALUATION_PACKAGES_BYTES + device,
        staging_bytes=EVALUATION_PACKAGES_BYTES,
        device_bytes=device,
        mapped_bytes=0,
        artifact=sizes.ArtifactSize(0, 100_000),
        scratch_bytes=0,
        work=work,
    )


def _evaluation_work(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    layers: Mapping[str, CompressedLinear | None] | None,
    *,
    delta: bool,
) -> Work:
    weights = float(model.num_weights)
    task_item = getattr(torch, settings.task_dtype).itemsize
    kind = {"float32": "fp32_flops", "bfloat16": "bf16_flops"}
    unpacking = sum(x.dequantize_bytes() for x in (layers or {}).values() if x is not None)
    # packed layers that unpack at every token are slow enough to end the measurement early
    forwards = 4 if unpacking > 10.0 * weights else 2 * (settings.decode_tokens + 1)
    one_token = Work(bytes_moved=1.5 * task_item * weights, calls=60.0 * len(model.linears) / 2)
    loaded = Work(bytes_moved=20.0 * weights) * (1 if layers is None else 2)
    speed = (one_token + Work(bytes_moved=unpacking)) * forwards
    tokens = len(settings.corpora) * settings.windows * settings.length
    models = 1 if layers is None else 2
    likelihood = Work(
        bytes_moved=tokens * model.vocabulary * (20.0 if models == 1 else 90.0)
        + unpacking
        + (12.0 * model.linear_weights if delta else 0.0)
    ) + Work(**{kind[settings.dtype]: 2.0 * weights * tokens * models})
    read = written = 0.0
    for name, limit in settings.tasks.items():
        text = texts.get(name, TaskText())
        items = text.items if limit is None else min(limit, text.items)
        read += items * text.requests * text.tokens
        written += -(-items // 64) * text.generated_tokens
    tasks = Work(
        **{kind[settings.task_dtype]: 2.0 * weights * read},
        bytes_moved=read * (model.vocabulary * 12.0 + PASS_BYTES * num_features(model)),
    )
    steps = one_token * 2.0 * (written + settings.sample_tokens)
    return (
        loaded + speed + likelihood + tasks + steps + Work(fixed_seconds=EVALUATION_STARTUP_SECONDS)
    )
