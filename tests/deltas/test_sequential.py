from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmpress.deltas.sequential import SequentialStatistics
from llmpress.methods.base import InputStatistics
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.experts import separate_experts
from llmpress.models.walk import BlockWalk

ORDER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Anything(dict[str, InputStatistics]):
    def __missing__(self, name: str) -> InputStatistics:
        del name
        return InputStatistics(torch.eye(1), 1, torch.ones(3))


def sequential(folder: Path, windows: Tensor) -> SequentialStatistics:
    checkpoint = Checkpoint(folder)
    walk = BlockWalk(checkpoint.skeleton(), checkpoint, device=torch.device("cpu"))
    return SequentialStatistics(walk, windows, Anything())


@torch.no_grad()
def moment(model: PreTrainedModel, name: str, windows: Tensor) -> Tensor:
    seen: list[Tensor] = []
    linear = model.get_submodule(name)
    hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    model(windows)
    hook.remove()
    x = torch.cat(seen)
    return x.T @ x / len(x)


@torch.no_grad()
def test_each_layer_sees_what_those_before_it_have_become(
    tiny_model_folder: Path, tiny_windows: Tensor
) -> None:
    statistics = sequential(tiny_model_folder, tiny_windows)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    for index in range(2):
        for own in ORDER:
            name = f"model.layers.{index}.{own}"
            found = statistics[name]
            torch.testing.assert_close(
                found.second_moment, moment(model, name, tiny_windows), rtol=1e-3, atol=1e-4
            )
            assert found.num_tokens == tiny_windows.numel()
            assert found.output_sensitivity is not None
            weight = model.get_submodule(name).weight
            difference = 0.3 * weight.abs().mean() * torch.randn(weight.shape)
            statistics.changed(name, difference)
            weight += difference


def test_layers_that_share_an_input_share_a_forward(
    tiny_model_folder: Path, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    statistics = sequential(tiny_model_folder, tiny_windows)
    forwards = []
    propagate = BlockWalk.propagate

    def counted(self, block, index, *args, **kwargs):  # type: ignore[no-untyped-def]
        forwards.append(index)
        return propagate(self, block, index, *args, **kwargs)

    monkeypatch.setattr(BlockWalk, "propagate", counted)
    for own in ORDER:
        name = f"model.layers.0.{own}"
        width = statistics[name].second_moment.shape[0]
        assert width == (176 if own == "mlp.down_proj" else 64)
        statistics.changed(name, torch.zeros(()))
    assert forwards == [0] * 4


def test_blocks_cannot_be_visited_again(tiny_model_folder: Path, tiny_windows: Tensor) -> None:
    statistics = sequential(tiny_model_folder, tiny_windows)
    assert statistics["model.layers.1.self_attn.q_proj"].num_tokens
    with pytest.raises(ValueError, match=r"block 0 .*1"):
        statistics["model.layers.0.self_attn.q_proj"]


def test_every_kind_of_block_can_be_walked(
    architecture_folder: Path, architecture: str, tiny_windows: Tensor
) -> None:
    statistics = sequential(architecture_folder, tiny_windows)
    model = AutoModelForCausalLM.from_pretrained(architecture_folder, dtype=torch.float32).eval()
    separate_experts(model)
    names = [name for name in Checkpoint(architecture_folder).names() if ".1." in name]
    layers = dict(model.named_modules())
    checked = 0
    for name in names:
        layer = layers.get(name.removesuffix(".weight"))
        if not isinstance(layer, torch.nn.Linear) or "expert" in name or "gate.weight" in name:
            continue
        if architecture.startswith("mamba") and "dt_proj" in name:
            continue  # its weight is multiplied from the left, so no hook sees it
        found = statistics[name.removesuffix(".weight")].second_moment
        expected = moment(model, name.removesuffix(".weight"), tiny_windows)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        checked += 1
    assert checked
