"""Experts one by one: what they compute, what is known of those that few tokens reach."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Llama4TextConfig

from llmpress.calibration.expert_statistics import (
    TYPICAL_TOKENS,
    output_sensitivities,
    second_moments,
)
from llmpress.calibration.files import load_statistics, save_calibration
from llmpress.core.artifacts import read_json
from llmpress.core.errors import SourceError
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.experts import expert_matrix, separate_experts
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk

MIXTURES = pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"], indirect=True)
NAMES = [f"mlp.experts.{number}.{{}}" for number in range(3)]


@MIXTURES
def test_separate_experts_compute_what_the_fused_ones_do(
    architecture_folder: Path, tiny_windows: Tensor
) -> None:
    fused, separate = (
        AutoModelForCausalLM.from_pretrained(architecture_folder, dtype=torch.float32)
        for _ in range(2)
    )
    separate_experts(separate)
    assert not any(p.ndim == 3 for p in separate.parameters())
    assert sum(p.numel() for p in separate.parameters()) == fused.num_parameters()
    with torch.inference_mode():
        found, expected = (m(tiny_windows[:3]).logits for m in (separate, fused))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["mixtral"], indirect=True)
def test_a_number_that_no_expert_has_stands_for_none(architecture_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture_folder, dtype=torch.float32)
    separate_experts(model)
    experts, x = model.model.layers[0].mlp.experts, torch.randn(3, 64)
    chosen = torch.tensor([[0, 4], [4, 4], [1, 0]])  # there are four: 0 to 3
    weights = torch.full((3, 2), 0.5)
    with torch.inference_mode():
        y = experts(x, chosen, weights)
        expected = [0.5 * experts[0](x[:1])[0], torch.zeros(64)]
        expected.append(0.5 * (experts[0](x[2:]) + experts[1](x[2:]))[0])
    torch.testing.assert_close(y, torch.stack(expected))


@MIXTURES
def test_experts_of_another_form_are_refused_by_name(architecture_folder: Path) -> None:
    model = Checkpoint(architecture_folder)
    plain = AutoModelForCausalLM.from_config(model.config)
    experts = plain.model.layers[1].mlp.experts
    experts.is_transposed = True
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.experts: .*is_transposed=True"):
        separate_experts(plain)


def test_experts_that_only_look_the_same_are_refused_by_their_shapes() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    config = Llama4TextConfig(
        **sizes,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    with pytest.raises(SourceError, match=r"\.experts: "):
        separate_experts(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("architecture", ["mixtral"], indirect=True)
def test_an_expert_that_no_token_reaches_leans_on_the_others(
    architecture_folder: Path,
    tiny_windows: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(architecture_folder, dtype=torch.float32)
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():  # the second expert: never among the best two of four
        router.weight[1] = router.weight[0] * 0.999
        router.weight[2] = -router.weight[0]
        router.weight[3] = router.weight[0] * 1.001
    model.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    walk = BlockWalk(skeleton(checkpoint), checkpoint, device=torch.device("cpu"))
    out = tmp_path / "calibration"
    out.mkdir()
    with caplog.at_level(logging.WARNING):
        save_calibration(walk, tiny_windows[:4], tiny_windows[4:5], out, tiny_windows[:2])
    tokens = read_json(out / "index.json")["tokens"]
    first = "model.layers.0.mlp.experts.{}.gate_proj"
    counts = [tokens[first.format(number)] for number in range(4)]
    assert sum(counts) == 2 * 4 * 64  # two experts a token
    rare = min(range(4), key=lambda number: counts[number])
    assert counts[rare] < 100
    assert "of 8 experts saw fewer than 100 calibration tokens" in caplog.text
    statistics = load_statistics(out)
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        known = statistics[f"model.layers.0.mlp.experts.{rare}.{matrix}"]
        assert known.num_tokens == counts[rare]
        assert bool((known.diagonal > 0).all())
        assert known.output_importance is not None


def test_few_tokens_are_drawn_towards_the_group_and_many_are_not() -> None:
    moments = [torch.diag(torch.tensor([1.0, 9.0])), torch.diag(torch.tensor([5.0, 1.0]))]
    names = [name.format("gate_proj") for name in NAMES]
    tokens = {names[0]: 1_000_000, names[1]: 10}
    sums = {name: moment * tokens[name] for name, moment in zip(names, moments, strict=False)}
    pooled = (sums[names[0]] + sums[names[1]]) / sum(tokens.values())
    found = second_moments(dict(sums), tokens, dict.fromkeys(names, 2))
    torch.testing.assert_close(found[names[2]], pooled)
    torch.testing.assert_close(found[names[0]], moments[0], rtol=1e-4, atol=1e-4)
    added = TYPICAL_TOKENS * sum(tokens.values()) / 3
    expected = (sums[names[1]] + added * pooled) / (10 + added)
    torch.testing.assert_close(found[names[1]], expected)


def test_the_inner_features_of_experts_have_no_direction_in_common() -> None:
    names = [name.format("down_proj") for name in NAMES]
    sums = {names[0]: torch.tensor([[8.0, 4.0], [4.0, 4.0]])}
    found = second_moments(sums, {names[0]: 2}, dict.fromkeys(names, 2))
    torch.testing.assert_close(found[names[1]], 3.0 * torch.eye(2))  # mean of 8 / 2 and 4 / 2


def test_layers_that_every_token_passes_are_plain_means() -> None:
    found = second_moments({"q_proj": torch.eye(2) * 6}, {"q_proj": 3}, {"q_proj": 2})
    torch.testing.assert_close(found["q_proj"], torch.eye(2) * 2)
    felt = output_sensitivities({"q_proj": torch.tensor([6.0])}, {"q_proj": 3}, 3)
    torch.testing.assert_close(felt["q_proj"], torch.tensor([2.0]))


def test_what_the_loss_feels_of_an_expert_counts_how_often_it_is_used() -> None:
    names = [name.format("up_proj") for name in NAMES]
    sums = {names[0]: torch.tensor([90.0, 30.0]), names[1]: torch.tensor([20.0, 40.0])}
    sums[names[2]] = torch.zeros(2)
    tokens = {names[0]: 60, names[1]: 30, names[2]: 0}
    found = output_sensitivities(sums, tokens, 100)
    typical = (90 + 30 + 20 + 40) / 2 / 90  # squared gradient of an output at a token
    added = TYPICAL_TOKENS * 90 / 3
    torch.testing.assert_close(found[names[2]], torch.full((2,), added * typical / 100))
    torch.testing.assert_close(found[names[0]], (sums[names[0]] + added * typical) / 100)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.experts.12.down_proj", ("model.layers.3.mlp.experts", 12)),
        ("model.layers.3.mlp.shared_expert.down_proj", None),
        ("model.layers.3.mlp.down_proj", None),
    ],
)
def test_names_of_experts(name: str, expected: tuple[str, int] | None) -> None:
    found = expert_matrix(name)
    assert (found and (found.group, found.number)) == expected


def test_a_plain_model_stays_as_it_is(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = list(model.modules())
    separate_experts(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in before]
    assert all(isinstance(m, nn.Module) for m in before)
