"""Models that somebody else quantized: their weights on every way, never their codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmpress
from llmpress.core.artifacts import read_json, read_provenance, write_json
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.deltas.applying import load_finetuned
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.models.checkpoints.files import Checkpoint, refuse_quantized
from llmpress.models.loading import load_model
from llmpress.planning import shapes
from llmpress.training.adapters import open_base

TOKENS = torch.arange(3, 99).view(2, 48)
TEXT = ["def f(x):\n    return x\n" * 200]
BLOCK = [48, 32]
"""The last block of the tiny model's matrices, of 64 or 176 rows, is cut off."""

RTN: dict[str, Any] = {"num_bits": 4, "group_size": 16}
Convert = Callable[[Tensor], dict[str, Tensor]]


def fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def blocks(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, BLOCK, strict=True))
    scale = torch.empty(rows, columns)
    spread = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            part = (slice(row * BLOCK[0], (row + 1) * BLOCK[0]),
                    slice(column * BLOCK[1], (column + 1) * BLOCK[1]))  # fmt: skip
            scale[row, column] = weight[part].abs().max() / 448
            spread[part] = scale[row, column]
    return {"weight": fp8(weight, spread), "weight_scale_inv": scale}


def whole(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max().reshape(1) / 448
    beside = {"weight_scale": scale.bfloat16(), "input_scale": torch.ones(1)}
    return {"weight": fp8(weight, scale), **beside}


def whole_fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().max() / 448
    return {"weight": fp8(weight, scale), "weight_scale_inv": scale}


def outputs(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def groups(weight: Tensor) -> dict[str, Tensor]:
    parts = weight.unflatten(1, (-1, 16))  # [out, groups, 16]
    low, high = parts.amin(2), parts.amax(2)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    codes = (parts / scale.unsqueeze(2) + zero.unsqueeze(2)).round().clamp(-128, 127)
    return {
        "weight": codes.flatten(1).to(torch.int8),
        "weight_scale": scale,
        "weight_zero_point": zero.to(torch.int8),
    }


def compressed_tensors(form: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {}}


VARIANTS: dict[str, tuple[Convert, dict[str, Any]]] = {
    "fp8 blocks": (blocks, {"quant_method": "fp8", "weight_block_size": BLOCK}),
    "fp8 whole": (whole_fp8, {"quant_method": "fp8"}),
    "compressed-tensors fp8": (whole, compressed_tensors("float-quantized")),
    "compressed-tensors int8": (outputs, compressed_tensors("int-quantized")),
    "compressed-tensors groups": (groups, compressed_tensors("naive-quantized")),
}


def quantized(
    source: Path,
    out: Path,
    convert: Convert,
    settings: dict[str, Any],
    which: tuple[str, ...] = ("proj",),
) -> Path:
    """A copy of a model whose linears, by default those in blocks, are codes with scales."""
    out.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix("weight")
        codes = name.endswith(tuple(f"{end}.weight" for end in which))
        own = convert(tensor.float()) if codes else {"weight": tensor}
        tensors |= {f"{layer}{part}": value.contiguous() for part, value in own.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    own = {"quantization_config": settings} if settings else {}
    write_json(out / "config.json", read_json(source / "config.json") | own)
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model.eval()(TOKENS).logits
    return found


def assert_near(found: torch.nn.Module, wanted: Tensor, tolerance: float) -> None:
    assert (logits(found) - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_and_no_codes_on_every_way(
    name: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = quantized(tiny_model_folder, tmp_path / "source", *VARIANTS[name])
    original = logits(load_model(tiny_model_folder))
    loaded = load_model(source)
    assert_near(loaded, original, 0.06)
    exactly = logits(loaded)  # what the codes stand for
    assert Checkpoint(source).names() == Checkpoint(tiny_model_folder).names()

    dense = llmpress.export_dense(source, out=tmp_path / "dense", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(dense)
    assert_near(plain, exactly, 1e-5)
    assert not hasattr(plain.config, "quantization_config")

    small = llmpress.compress_model(source, method="rtn", bits=8, group_size=16,
                                    out=tmp_path / "small", device="cpu")  # fmt: skip
    assert_near(load_model(small), exactly, 0.02)

    delta = extract_delta(tiny_model_folder, source, out=tmp_path / "delta")
    packed = compress_delta(delta, method="rtn", bits=8, group_size=16, out=tmp_path / "packed",
                            device="cpu")  # fmt: skip
    assert_near(load_finetuned(tiny_model_folder, packed), exactly, 1e-3)
    applied = llmpress.export_dense(tiny_model_folder, delta=packed, out=tmp_path / "applied",
                                    dtype="float32")  # fmt: skip
    assert_near(load_model(applied), exactly, 1e-3)

    how: dict[str, Any] = {"text": TEXT, "windows": 2, "length": 32, "device": "cpu"}
    llmpress.calibrate_model(source, out=tmp_path / "on-codes", autocast=False, **how)
    llmpress.calibrate_model(dense, out=tmp_path / "on-dense", autocast=False, **how)
    for file in (tmp_path / "on-dense").glob("moments-*.safetensors"):
        for key, moment in load_file(tmp_path / "on-codes" / file.name).items():
            torch.testing.assert_close(moment, load_file(file)[key], rtol=1e-4, atol=1e-5)

    method = VARIANTS[name][1]["quant_method"]
    made = {"dense": "model", "small": "model", "delta": "finetuned", "on-codes": "model"}
    for folder, role in made.items():
        assert read_provenance(tmp_path / folder)["dequantized"] == {role: method}
    assert "dequantized" not in read_provenance(tmp_path / "packed")


def test_a_quantized_model_is_not_trained(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = quantized(tiny_model_folder, tmp_path / "source", *VARIANTS["fp8 blocks"])
    with pytest.raises(SourceError, match="fp8"):
        open_base(source, quantize=True, device=torch.device("cpu"))
    with pytest.raises(SourceError, match="fp8"):
        refuse_quantized(source)  # as training all weights does


def even(weight: Tensor) -> dict[str, Tensor]:
    """One scale, as a grid of blocks that fits."""
    scale = weight.abs().max() / 448
    grid = scale.reshape(1, 1).repeat(weight.shape[0] // 16, weight.shape[1] // 16)
    return {"weight": fp8(weight, scale), "weight_scale_inv": grid}


EVEN = {"quant_method": "fp8", "weight_block_size": [16, 16], "dequantize": True}


def test_transformers_dequantizes_alike(tiny_model_folder: Path, tmp_path: Path) -> None:
    source = quantized(tiny_model_folder, tmp_path / "source", even, EVEN)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert_near(load_model(source), logits(theirs), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_compressed_is_what_transformers_dequantizes(
    dtype: torch.dtype, tiny_model_folder: Path, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=dtype)
    plain.config.tie_word_embeddings = False
    plain.lm_head.weight = torch.nn.Parameter(plain.model.embed_tokens.weight.flip(0))
    plain.save_pretrained(tmp_path / "plain")
    source = quantized(tmp_path / "plain", tmp_path / "source", even, EVEN, ("proj", "lm_head"))
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert theirs.dtype == dtype
    wanted = dict(theirs.named_parameters())

    packed = llmpress.compress_model(source, method="lillama", rank=32, start="weights",
                                     out=tmp_path / "packed", device="cpu")  # fmt: skip
    stored, dense = load_file(packed / "model.safetensors"), 0
    for name, tensor in stored.items():
        if name in wanted and tensor.numel():
            torch.testing.assert_close(tensor, wanted[name].data, rtol=0, atol=0)
            dense += name.endswith("proj.weight")
    assert "lm_head.weight" in stored
    assert dense
    planned = shapes.model_bytes(shapes.read_shapes(source), llmpress.build_method("rtn", RTN))
    small = llmpress.compress_model(source, method="rtn", out=tmp_path / "small", **RTN)
    assert planned == (small / "model.safetensors").stat().st_size
    for record in read_json(packed / "layers.json")["layers"]:
        if record["kind"] == "dense":
            assert record["stored_bits"] == 8 * stored[f"{record['name']}.weight"].nbytes

    whole = load_file(llmpress.export_dense(source, out=tmp_path / "dense", dtype=dtype)
                      / "model.safetensors")  # fmt: skip
    for name, parameter in wanted.items():
        torch.testing.assert_close(whole[name], parameter.data, rtol=0, atol=0)
    delta = extract_delta(tiny_model_folder, source, out=tmp_path / "delta")
    (head,) = [t for n, t in load_file(delta / "delta.safetensors").items() if "lm_head" in n]
    torch.testing.assert_close(head, wanted["lm_head.weight"].data, rtol=0, atol=0)


OTHERS = ["gptq", "awq", "bitsandbytes", "mxfp4", "hqq", "torchao", "quanto", "aqlm", "vptq"]


@pytest.mark.parametrize("method", OTHERS)
def test_other_quantizations_are_refused_by_name(
    method: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    settings = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    source = quantized(tiny_model_folder, tmp_path / "source", outputs, settings)
    ways: list[Callable[[], object]] = [
        lambda: load_model(source),
        lambda: llmpress.compress_model(source, method="rtn", bits=8, out=tmp_path / "out"),
        lambda: llmpress.calibrate_model(
            source, text=TEXT, windows=2, length=32, out=tmp_path / "out"
        ),
        lambda: extract_delta(tiny_model_folder, source, out=tmp_path / "out"),
        lambda: extract_delta(source, tiny_model_folder, out=tmp_path / "out"),
        lambda: llmpress.export_dense(source, out=tmp_path / "out"),
    ]
    for way in ways:
        with pytest.raises(SourceError, match=method):
            way()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        compressed_tensors("pack-quantized"),
        compressed_tensors("int-quantized") | {"transform_config": {"x": 1}},
    ],
    ids=["packed", "rotated"],
)
def test_other_forms_are_refused(
    settings: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = quantized(tiny_model_folder, tmp_path / "source", outputs, settings)
    with pytest.raises(SourceError, match="compressed-tensors"):
        Checkpoint(source)


@pytest.mark.parametrize("name", ["fp8 whole", "compressed-tensors int8"])
def test_codes_without_scales_are_refused(
    name: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    convert, settings = VARIANTS[name]

    def bare(weight: Tensor) -> dict[str, Tensor]:
        return {"weight": convert(weight)["weight"]}

    for number, own in enumerate((settings, {})):
        source = quantized(tiny_model_folder, tmp_path / str(number), bare, own)
        with pytest.raises(SourceError, match=r"layers\.0.*weight"):
            Checkpoint(source)


def test_scales_that_do_not_fit_are_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    def wrong(weight: Tensor) -> dict[str, Tensor]:
        return {**outputs(weight), "weight_scale": torch.ones(3, 1)}

    source = quantized(tiny_model_folder, tmp_path / "source", wrong,
                       compressed_tensors("int-quantized"))  # fmt: skip
    with pytest.raises(ArtifactError, match=r"k_proj\.weight"):
        Checkpoint(source).tensor("model.layers.0.self_attn.k_proj.weight")
