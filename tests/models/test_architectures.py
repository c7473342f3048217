"""One rule for all architectures: from calibration to a loaded, saved and exported model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, HELD_OUT_PACKAGES, OTHER_PACKAGES, built_once, library_text
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import llmpress
from llmpress.calibration.files import load_statistics
from llmpress.calibration.stage import calibrate_model
from llmpress.compression.stage import compress_model
from llmpress.core.artifacts import read_json
from llmpress.data.corpora import CalibrationText
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.methods.base import Method
from llmpress.methods.lillama import Lillama
from llmpress.methods.rtn import RTN
from llmpress.methods.svd import SVD
from llmpress.models.architectures import block_linears, replace_module
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.experts import SeparateExperts, separate_experts
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import CompressedLinear
from llmpress.tuning.stage import finetune_model

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def calibrated(shared_folder: Path, architecture: str, architecture_folder: Path) -> Path:
    text = CalibrationText(library_text(OTHER_PACKAGES), library_text(HELD_OUT_PACKAGES))
    return built_once(
        shared_folder,
        f"calibration-{architecture}",
        lambda out: calibrate_model(
            architecture_folder,
            text={"code": text},
            out=out,
            windows=16,
            length=64,
            validation_windows=4,
            seed=0,
            device=CPU,
        ),
    )


def compress(folder: Path, out: Path, method: Method, calibration: Path | None) -> Path:
    compress_model(
        folder,
        method=method,
        calibration=calibration,
        seed=0,
        device=CPU,
        scratch=out.parent / "scratch",
        out=out,
    )
    return out


@pytest.fixture(scope="session")
def low_rank(
    shared_folder: Path, architecture: str, architecture_folder: Path, calibrated: Path
) -> Path:
    """The model with every matrix that can be at rank 4, whatever that costs."""
    return built_once(
        shared_folder,
        f"low-rank-{architecture}",
        lambda out: compress(architecture_folder, out, Lillama(rank=4), calibrated),
    )


def test_every_matrix_of_the_blocks_is_compressed_but_the_routers(
    architecture: str, architecture_folder: Path, low_rank: Path
) -> None:
    model = llmpress.load_model(low_rank)
    compressed = {n for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    first = [name for name in compressed if ".layers.0." in name]
    assert len(first) == ARCHITECTURES[architecture].matrices
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert left <= {"lm_head"}
    assert not any("router" in name or name.endswith("mlp.gate") for name in compressed)
    original = Checkpoint(architecture_folder)
    assert {f"{name}.weight" for name in compressed} <= set(original.names())


def test_statistics_and_gradients_of_every_matrix(
    architecture_folder: Path, calibrated: Path
) -> None:
    statistics = load_statistics(calibrated)
    for linears in block_linears(skeleton(Checkpoint(architecture_folder))):
        for name, linear in linears.items():
            known = statistics[name]
            assert known.second_moment.shape == (linear.in_features, linear.in_features)
            assert bool((known.diagonal > 0).all())
            assert known.output_importance is not None
            assert known.output_importance.shape == (linear.out_features,)


def test_blocks_walked_one_by_one_give_the_models_own_predictions(
    architecture_folder: Path, tiny_windows: Tensor
) -> None:
    checkpoint = Checkpoint(architecture_folder)
    walk = BlockWalk(skeleton(checkpoint), checkpoint, device=CPU)
    hidden = walk.embed(tiny_windows[:3])
    for index in range(len(walk)):
        hidden = walk.propagate(walk.load(index), index, hidden)
    model = AutoModelForCausalLM.from_pretrained(architecture_folder, dtype=torch.float32)
    seen = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    blocks[-1].register_forward_hook(lambda _m, _x, y: seen.append(y))
    with torch.inference_mode():
        model(tiny_windows[:3])
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(hidden, output, rtol=1e-4, atol=1e-4)


def test_eight_bits_change_next_to_nothing(
    architecture_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    method = RTN(num_bits=8, group_size=16)
    packed = llmpress.load_model(compress(architecture_folder, tmp_path / "out", method, None))
    original = llmpress.load_model(architecture_folder)
    with torch.inference_mode():
        found, expected = (m(tiny_windows[:2]).logits for m in (packed, original))
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_it_generates_and_is_saved_again_bit_for_bit(
    low_rank: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    model = llmpress.load_model(low_rank, dtype="auto")
    texts = model.generate(tiny_windows[:2, :8], max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (low_rank, tmp_path / "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)
    again = llmpress.load_model(tmp_path / "again", dtype="auto")
    same = again.generate(tiny_windows[:2, :8], max_new_tokens=5, do_sample=False)
    assert same.tolist() == texts.tolist()


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"], indirect=True)
def test_experts_that_stay_dense_are_not_fused_again(
    architecture_folder: Path, calibrated: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    method = Lillama(reduction=0.05)
    small = compress(architecture_folder, tmp_path / "small", method, calibrated)
    model = llmpress.load_model(small, dtype="auto")
    matrices = [m for n, m in model.named_modules() if ".experts." in n and n.endswith("_proj")]
    dense = [matrix for matrix in matrices if isinstance(matrix, nn.Linear)]
    assert 0 < len(dense) < len(matrices)
    model.save_pretrained(tmp_path / "again")
    again = llmpress.load_model(tmp_path / "again", dtype="auto")
    with torch.inference_mode():
        found, expected = (m(tiny_windows[:1]).logits for m in (again, model))
    torch.testing.assert_close(found, expected)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    original = llmpress.load_model(architecture_folder).state_dict()
    name = next(n for n, m in model.named_modules() if m is dense[0])
    group, number, matrix = name.rsplit(".", 2)
    fused = original[f"{group}.{'down_proj' if matrix == 'down_proj' else 'gate_up_proj'}"]
    rows = fused[int(number)]
    half = len(rows) // 2
    part = {"gate_proj": rows[:half], "up_proj": rows[half:], "down_proj": rows}[matrix]
    torch.testing.assert_close(dense[0].weight.data, part.bfloat16().float(), rtol=0, atol=0)


def test_step_by_step_it_computes_what_it_computes_at_once(
    low_rank: Path, tiny_windows: Tensor
) -> None:
    model = llmpress.load_model(low_rank)
    with torch.inference_mode():
        whole = model(tiny_windows[:1, :12]).logits[:, -1]
        start = model(tiny_windows[:1, :11], use_cache=True)
        name = "cache_params" if "cache_params" in start else "past_key_values"
        last = model(tiny_windows[:1, 11:12], **{name: start[name]}, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")  # in transformers' Mamba
@pytest.mark.parametrize("architecture", ["phi3", "mixtral", "mamba"], indirect=True)
def test_it_compiles(architecture: str, low_rank: Path, tiny_windows: Tensor) -> None:
    model = llmpress.load_model(low_rank)
    whole = architecture != "mixtral"  # which experts run depends on the tokens: a graph each
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    with torch.no_grad():
        expected, found = (m(tiny_windows[:1, :16]).logits for m in (model, compiled))
    torch.testing.assert_close(found, expected)


def test_the_dense_export_needs_no_llmpress(
    architecture: str,
    architecture_folder: Path,
    low_rank: Path,
    tiny_windows: Tensor,
    tmp_path: Path,
) -> None:
    llmpress.export_dense(low_rank, out=tmp_path / "dense", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert not any(isinstance(m, CompressedLinear | SeparateExperts) for m in plain.modules())
    names, original = (
        set(load_file(folder / "model.safetensors"))
        for folder in (tmp_path / "dense", architecture_folder)
    )
    assert names == original, architecture
    packed = llmpress.dequantized(llmpress.load_model(low_rank))
    with torch.inference_mode():
        found, expected = (m(tiny_windows[:2]).logits for m in (plain, packed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_two_plain_linears_need_no_llmpress(
    architecture: str, low_rank: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    llmpress.export_factors(low_rank, out=tmp_path / "factors", dtype=torch.float32)
    tensors = load_file(tmp_path / "factors/model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path / "factors")
    plain = AutoModelForCausalLM.from_config(config).float().eval()
    separate_experts(plain)  # transformers' own has no linears there
    for name in [name for name in tensors if name.endswith(".0.weight")]:
        linear = plain.get_submodule(name.removesuffix(".0.weight"))
        rank, in_features = tensors[name].shape
        assert rank == 4
        pair = nn.Sequential(
            nn.Linear(in_features, rank, bias=False),
            nn.Linear(rank, linear.out_features, bias=linear.bias is not None),
        )
        replace_module(plain, name.removesuffix(".0.weight"), pair)
    missing, unexpected = plain.load_state_dict(tensors, strict=False)
    assert not unexpected, architecture
    assert set(missing) <= {"lm_head.weight"}
    plain.tie_weights()
    packed = llmpress.load_model(low_rank)
    with torch.inference_mode():
        found, expected = (m(tiny_windows[:2]).logits for m in (plain, packed))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_distillation_learns_in_every_block(
    architecture_folder: Path, low_rank: Path, calibrated: Path, tmp_path: Path
) -> None:
    finetune_model(
        low_rank,
        original=architecture_folder,
        calibration=calibrated,
        out=tmp_path / "tuned",
        epochs=4,
        learning_rate=0.003,
        batch_size=2,
        method=Lillama(rank=4),
        seed=0,
        device=CPU,
        scratch=tmp_path / "scratch",
    )
    blocks = read_json(tmp_path / "tuned/layers.json")["blocks"]
    assert len(blocks) == 2
    for block in blocks:
        assert block["train_loss"][-1] < block["train_loss"][0]
    before, after = (sum(block[f"loss_{x}"] for block in blocks) for x in ("before", "after"))
    assert after < before


@pytest.mark.parametrize("architecture", ["mixtral", "mamba"], indirect=True)
def test_a_delta_is_extracted_compressed_and_applied(
    architecture_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(architecture_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter) * parameter.std())
    base.save_pretrained(tmp_path / "finetuned")
    extract_delta(architecture_folder, tmp_path / "finetuned", out=tmp_path / "delta")
    compress_delta(
        tmp_path / "delta",
        method=SVD(bits=64.0),
        seed=0,
        device=CPU,
        scratch=tmp_path / "scratch",
        out=tmp_path / "small",
    )
    model = llmpress.load_delta(llmpress.load_model(architecture_folder), tmp_path / "small")
    with torch.inference_mode():
        found, expected = (m.eval()(tiny_windows[:2]).logits for m in (model, base))
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
