"""The block engine against the model run as a whole."""

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmpress.calibration.files import load_statistics, load_windows, save_calibration
from llmpress.core.errors import ArtifactError, NumericalError
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter
from llmpress.models.loading import load_model
from llmpress.models.walk import BlockWalk

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


_OLD = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
_NEO = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 32}

_BAMBA = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_BAMBA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 8}
_BAMBA |= {"attn_layer_indices": [1]}


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gptj", _OLD),
        ("codegen", _OLD),
        ("gpt_neo", {**_NEO, "attention_types": [[["global", "local"], 1]]}),
        ("bamba", {**_BAMBA, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}),
    ],
)
def test_blocks_whose_output_is_read_as_a_tuple(
    model_type: str, sizes: dict[str, Any], tiny_windows: Tensor, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(model_type, **sizes, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    walk = BlockWalk(checkpoint.skeleton(), checkpoint, device=CPU)
    hidden = walk.embed(tiny_windows[:2])
    for index in range(len(walk)):
        hidden = walk.propagate(walk.load(index), index, hidden)
    with torch.no_grad():
        states = model(tiny_windows[:2], output_hidden_states=True).hidden_states
        final = model.model.final_layernorm if model_type == "bamba" else model.transformer.ln_f
        torch.testing.assert_close(final(hidden), states[-1], rtol=1e-4, atol=1e-4)
    out = tmp_path / "calibration"
    out.mkdir()
    save_calibration(walk, tiny_windows[:3], tiny_windows[3:4], out, tiny_windows[:1])
    assert all(known.output_importance is not None for known in load_statistics(out).values())


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
    with pytest.raises(ArtifactError, match=r"moments-001\.safetensors"):
        load_statistics(tmp_path)["model.layers.1.mlp.up_proj"]


def test_a_nan_weight_is_named(walk: BlockWalk, tiny_windows: Tensor) -> None:
    hidden = walk.embed(tiny_windows[:1])
    block = walk.load(2)
    block.mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.2"):
        walk.propagate(block, 2, hidden)


def test_in_place_gives_the_same_in_the_same_buffer(walk: BlockWalk, tiny_windows: Tensor) -> None:
    hidden, block = walk.embed(tiny_windows[:5]), walk.load(0)
    expected = walk.propagate(block, 0, hidden)
    found = walk.propagate(block, 0, hidden, batch_size=2, in_place=True)
    assert found.data_ptr() == hidden.data_ptr() != expected.data_ptr()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_long_windows_are_computed_few_at_a_time(
    walk: BlockWalk, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, block = walk.embed(tiny_windows[:5]), walk.load(0)
    sizes: list[int] = []
    forward = BlockWalk.forward
    monkeypatch.setattr(
        BlockWalk,
        "forward",
        lambda *a: sizes.append(len(a[3])) or forward(*a),  # type: ignore[func-returns-value]
    )
    walk.propagate(block, 0, hidden)
    monkeypatch.setattr("llmpress.models.walk.PROPAGATE_TOKENS", 2 * 64)
    walk.propagate(block, 0, hidden)
    monkeypatch.setattr("llmpress.models.walk.PROPAGATE_TOKENS", 1)
    walk.propagate(block, 0, hidden)
    assert sizes == [5, 2, 2, 1, *[1] * 5]


class CountingSource:
    """A checkpoint in memory that knows how many of the tensors it gave out are alive."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.asked: Counter[str] = Counter()
        self.alive = self.most_alive = 0

    def names(self) -> list[str]:
        return self.checkpoint.names()

    def tensor(self, name: str) -> Tensor:
        self.asked[name] += 1
        array = np.array(self.checkpoint.tensor(name).numpy())
        self.alive += array.size
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(array, self.freed, array.size)
        return torch.from_numpy(array)  # keeps the array until its storage is freed

    def freed(self, size: int) -> None:
        self.alive -= size


def test_one_block_is_asked_for_and_alive_at_a_time(
    tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(tiny_model_folder)
    source = CountingSource(checkpoint)
    walk = BlockWalk(checkpoint.skeleton(), source, device=CPU)
    block = sum(p.numel() for p in walk.blocks[0].parameters())
    save_calibration(walk, tiny_windows[:3], tiny_windows[3:4], tmp_path)
    assert source.most_alive == block  # more than the embeddings
    assert source.alive == 0
    assert set(source.asked.values()) == {1}


def test_a_model_far_larger_than_a_block_is_streamed_from_its_shards(tmp_path: Path) -> None:
    depth, hidden = 16, 512
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=1408,
        num_hidden_layers=1,
        num_attention_heads=8,
    )
    one = LlamaForCausalLM(config)
    block_bytes = 4 * sum(p.numel() for p in one.model.layers.parameters())
    writer = CheckpointWriter(tmp_path, max_shard_bytes=3 * block_bytes)
    for name, tensor in one.state_dict().items():
        for index in range(depth) if ".layers.0." in name else [0]:
            writer.add(name.replace(".0.", f".{index}."), tensor)
    writer.close()
    config.num_hidden_layers = depth
    config.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 5
    checkpoint = Checkpoint(tmp_path)
    walk = BlockWalk(checkpoint.skeleton(), checkpoint, device=CPU)
    states = walk.embed(torch.zeros(1, 16, dtype=torch.int64))
    walk.propagate(walk.load(0), 0, states)  # what the first product allocates stays
    before, most = resident_bytes(), 0
    for index in range(depth):
        block = walk.load(index)
        states = walk.propagate(block, index, states, in_place=True)
        most = max(most, resident_bytes() - before)
        del block
    assert most < 2 * block_bytes  # of 16; mapped pages count too


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.fixture
def bf16_model(tiny_model_folder: Path, tmp_path: Path) -> Checkpoint:
    """The tiny model with its weights stored in bf16."""
    LlamaForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "bf16"
    )
    return Checkpoint(tmp_path / "bf16")


def test_under_autocast_linears_stay_bf16_and_the_result_is_the_same_to_the_bit(
    bf16_model: Checkpoint, tiny_windows: Tensor
) -> None:
    walk = BlockWalk(bf16_model.skeleton(), bf16_model, device=CPU, autocast=True)
    states = walk.embed(tiny_windows[:4]).requires_grad_(requires_grad=True)
    block = walk.load(1)
    dtypes = {name: p.dtype for name, p in block.named_parameters()}
    assert {d for n, d in dtypes.items() if "proj" in n} == {torch.bfloat16}
    assert {d for n, d in dtypes.items() if "norm" in n} == {torch.float32}
    found = walk.forward(block, 1, states)
    (found_gradient,) = torch.autograd.grad(found.square().sum(), states)
    expected = walk.forward(block.float(), 1, states)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), states)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=0, atol=0)


def test_without_autocast_all_weights_become_fp32(bf16_model: Checkpoint) -> None:
    walk = BlockWalk(bf16_model.skeleton(), bf16_model, device=CPU)
    assert {p.dtype for p in walk.load(0).parameters()} == {torch.float32}


def test_the_writer_holds_one_tensor_and_writes_what_safetensors_would(tmp_path: Path) -> None:
    arrays = {f"layer.{i}": np.random.default_rng(i).random((3, 40 + i)) for i in range(6)}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    tensors |= {"half": torch.ones(5).half(), "codes": torch.arange(7).byte()}
    writer, alive = CheckpointWriter(tmp_path), []
    for name, tensor in tensors.items():
        if name in arrays:
            alive.append(weakref.ref(arrays[name]))
            writer.add(name, torch.from_numpy(arrays.pop(name)))
        else:
            writer.add(name, tensor)
    assert not any(reference() is not None for reference in alive)
    writer.close()
    save_file(tensors, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "expected.safetensors"}
