"""The block engine against the model run as a whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmpress.blocks import BlockWalk
from llmpress.calibration import load_statistics, load_windows, save_calibration
from llmpress.checkpoints import Checkpoint
from llmpress.errors import ArtifactError, NumericalError
from llmpress.hf import load_model

CPU = torch.device("cpu")


@pytest.fixture
def walk(tiny_model_folder: Path) -> BlockWalk:
    checkpoint = Checkpoint(tiny_model_folder)
    return BlockWalk(checkpoint.skeleton(), checkpoint, device=CPU)


def test_walking_block_by_block_gives_the_models_hidden_states(
    walk: BlockWalk, tiny_model_folder: Path, tiny_windows: Tensor
) -> None:
    model = load_model(tiny_model_folder)
    with torch.no_grad():
        expected = model(tiny_windows[:5], output_hidden_states=True).hidden_states
    hidden = walk.embed(tiny_windows[:5])
    torch.testing.assert_close(hidden, expected[0])
    for index in range(len(walk) - 1):  # the last of transformers' states is already normalised
        hidden = walk.propagate(walk.load(index), index, hidden, batch_size=2)
        torch.testing.assert_close(hidden, expected[index + 1], rtol=1e-4, atol=1e-4)


def test_a_block_is_only_in_memory_while_it_is_used(walk: BlockWalk, tiny_windows: Tensor) -> None:
    walk.embed(tiny_windows[:1])
    walk.load(0)
    assert all(p.is_meta for p in walk.skeleton.parameters())


def test_statistics_are_the_second_moments_of_the_inputs(
    walk: BlockWalk, tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    save_calibration(walk, tiny_windows[:6], tiny_windows[6:8], tmp_path)
    statistics = load_statistics(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    model, seen = load_model(tiny_model_folder), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model(tiny_windows[:6])
    x = seen[0].flatten(0, 1).double()
    torch.testing.assert_close(
        statistics[name].second_moment.double(), x.t() @ x / len(x), rtol=1e-3, atol=1e-5
    )
    assert statistics[name].num_tokens == 6 * 64
    assert len(statistics) == 3 * 7
    calibration, validation = load_windows(tmp_path)
    torch.testing.assert_close(calibration, tiny_windows[:6])
    torch.testing.assert_close(validation, tiny_windows[6:8])


def test_layers_with_the_same_input_share_one_moment(
    walk: BlockWalk, tiny_windows: Tensor, tmp_path: Path
) -> None:
    save_calibration(walk, tiny_windows[:2], tiny_windows[2:3], tmp_path)
    stored = load_file(tmp_path / "moments-000.safetensors")
    assert sorted(stored) == [
        "mlp.down_proj",
        "mlp.gate_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
    ]
    assert {t.dtype for t in stored.values()} == {torch.float32}


def test_autocast_leaves_the_sums_in_fp32(
    tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_model_folder)
    walk = BlockWalk(checkpoint.skeleton(), checkpoint, device=CPU, autocast=True)
    save_calibration(walk, tiny_windows[:2], tiny_windows[2:3], tmp_path)
    moment = load_statistics(tmp_path)["model.layers.0.mlp.down_proj"].second_moment
    assert moment.dtype == torch.float32
    assert bool((moment != moment.bfloat16()).any())


def test_damaged_statistics_name_the_file(
    walk: BlockWalk, tiny_windows: Tensor, tmp_path: Path
) -> None:
    save_calibration(walk, tiny_windows[:2], tiny_windows[2:3], tmp_path)
    file = tmp_path / "moments-001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"moments-001\.safetensors: damaged"):
        load_statistics(tmp_path)["model.layers.1.mlp.up_proj"]


def test_a_nan_weight_is_named(walk: BlockWalk, tiny_windows: Tensor) -> None:
    hidden = walk.embed(tiny_windows[:1])
    block = walk.load(2)
    block.mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.2: the output holds NaN"):
        walk.propagate(block, 2, hidden)
