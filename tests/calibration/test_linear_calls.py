"""Linears whose weight is multiplied from the left, as Mamba's ``dt_proj``."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmpress.calibration.files import load_statistics, save_calibration
from llmpress.calibration.linear_calls import LinearCall, linear_calls
from llmpress.calibration.sensitivity import output_sensitivity
from llmpress.core.errors import SourceError
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import load_model, skeleton
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import AdaptedLinear
from llmpress.nn.layers.low_rank import LowRankLinear

MAMBA = pytest.mark.parametrize("architecture", ["mamba"], indirect=True)
DT_PROJ = "backbone.layers.1.mixer.dt_proj"


def walk_of(folder: Path) -> BlockWalk:
    checkpoint = Checkpoint(folder)
    return BlockWalk(skeleton(checkpoint), checkpoint, device=torch.device("cpu"))


@MAMBA
def test_its_input_is_what_comes_out_of_the_projection_before(
    architecture_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    save_calibration(walk_of(architecture_folder), tiny_windows[:3], tiny_windows[3:4], tmp_path)
    model, seen = load_model(architecture_folder), []
    before = model.get_submodule(DT_PROJ.replace("dt_proj", "x_proj"))
    before.register_forward_hook(lambda _m, _x, y: seen.append(y))
    with torch.inference_mode():
        model(tiny_windows[:3])
    steps = seen[0][..., :16].flatten(0, 1)  # the time steps come first
    moment = load_statistics(tmp_path)[DT_PROJ].second_moment
    torch.testing.assert_close(moment, steps.t() @ steps / len(steps), rtol=1e-3, atol=1e-6)


@MAMBA
def test_its_gradient_is_that_of_the_bias_added_to_it(
    architecture_folder: Path, tiny_windows: Tensor
) -> None:
    token = tiny_windows[:1, :1]  # of a single token: squares are those of the bias's gradient
    found = output_sensitivity(walk_of(architecture_folder), token, seed=3)[DT_PROJ]
    model = load_model(architecture_folder)
    bias = model.get_submodule(DT_PROJ).bias
    logits = model(token).logits[0]
    reached = logits.detach().softmax(-1).cumsum(-1)
    drawn = torch.rand(1, 1, generator=torch.Generator().manual_seed(3)) * reached[:, -1:]
    label = torch.searchsorted(reached, drawn)[:, 0]
    torch.nn.functional.cross_entropy(logits, label, reduction="sum").backward()
    torch.testing.assert_close(found, bias.grad.square(), rtol=1e-3, atol=1e-12)


def test_every_use_is_told_while_it_listens() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.multiplied = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.multiplied.weight @ self.called(x).transpose(-1, -2)

    block, calls = Block(), list[LinearCall]()
    x = torch.randn(2, 5, 3)
    with linear_calls(block, calls.append):
        y = block(x)
    block(x)
    assert [(call.name, call.axis) for call in calls] == [("called", -1), ("multiplied", -2)]
    torch.testing.assert_close(calls[0].x, x)
    torch.testing.assert_close(calls[1].y, y)


def test_a_linear_that_is_used_in_an_unknown_way_is_named(
    tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    walk = walk_of(tiny_model_folder)
    for block in walk.blocks:
        block.mlp.unused = nn.Linear(4, 4, device="meta")
    state = {
        f"model.layers.{i}.mlp.unused.{k}": torch.zeros(s)
        for i in range(3)
        for k, s in (("weight", (4, 4)), ("bias", (4,)))
    }
    names, tensor = walk.source.names, walk.source.tensor
    walk.source.names = lambda: sorted([*names(), *state])
    walk.source.tensor = lambda name: state[name] if name in state else tensor(name)
    with pytest.raises(SourceError, match=r"mlp\.unused"):
        save_calibration(walk, tiny_windows[:1], tiny_windows[1:2], tmp_path)


@pytest.mark.parametrize("bias", [False, True])
def test_a_compressed_weight_is_multiplied_without_its_bias(bias: bool) -> None:
    layer = LowRankLinear.from_factors(torch.randn(6, 2), torch.randn(2, 4), "float32")
    layer.bias = nn.Parameter(torch.randn(6)) if bias else None
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(layer.weight @ x, layer.dequantize() @ x)
    base = nn.Linear(4, 6, bias=bias)
    adapted = AdaptedLinear(base, layer)
    torch.testing.assert_close(adapted.weight @ x, (base.weight + layer.dequantize()) @ x)
    assert adapted.bias is base.bias
    stacked = AdaptedLinear(layer, layer)
    torch.testing.assert_close(stacked.weight @ x, 2 * layer.dequantize() @ x)
    with pytest.raises(TypeError, match="Identity"):
        AdaptedLinear(nn.Identity(), layer).weight @ x
