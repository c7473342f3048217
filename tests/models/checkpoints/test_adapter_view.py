"""LoRA adapters of peft are read as merged models, and written from compressed deltas."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmpress
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmpress.core.artifacts import artifact_folder, read_json, read_provenance, write_json
from llmpress.core.errors import ArtifactError, ConfigError, NumericalError, SourceError
from llmpress.deltas.applying import load_delta
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.export.adapter import export_adapter
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.adapter_view import FACTORS, PREFIX, AdapterCheckpoint
from llmpress.models.checkpoints.delta_files import DeltaFolder, DeltaWriter
from llmpress.models.checkpoints.dense_view import delta_layer
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.loading import load_model
from llmpress.nn.layers.low_rank import LowRankLinear
from llmpress.nn.layers.mixed_low_rank import MixedLowRankLinear

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated"  # which peft uses
)

QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
TARGETS = ["q_proj", "v_proj", "down_proj"]


def build_model(folder: Path, *, tied: bool = False) -> Path:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    disturb(model.parameters(), 0.05)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def disturb(parameters: Any, size: float) -> None:
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_model(tmp_path / "base")


def build_adapter(base: Path, out: Path, **settings: Any) -> dict[str, Tensor]:
    """Save an adapter with random tensors, and return the merged model's."""
    config = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(load_model(base), peft.LoraConfig(**(config | settings)))
    disturb([p for p in wrapped.parameters() if p.requires_grad], 0.1)
    wrapped.save_pretrained(out)
    merged: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return merged


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "rank_pattern": {"q_proj": 2, "layers.0.mlp.down_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
        {"use_rslora": True, "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2}},
        {"modules_to_save": ["lm_head", "norm"]},
        {"bias": "all"},
        {"target_modules": ["lm_head", "o_proj"]},
    ],
    ids=["plain", "patterns", "rslora", "modules_to_save", "biases", "head"],
)
def test_an_adapter_is_read_as_peft_merges_it(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    merged = build_adapter(base, tmp_path / "adapter", **settings)
    view = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    assert view.names() == sorted(merged)
    changed = 0
    for name, expected in merged.items():
        assert view.shape(name) == tuple(expected.shape)
        torch.testing.assert_close(view.tensor(name), expected, rtol=1e-5, atol=1e-6)
        changed += bool((expected != Checkpoint(base).tensor(name)).any())
    assert changed > 1


def test_a_head_that_an_adapter_saves_is_shared_no_more(tmp_path: Path) -> None:
    base = build_model(tmp_path / "tied", tied=True)
    build_adapter(base, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    embeddings = torch.randn(96, 32)
    old = Checkpoint(base).tensor("model.embed_tokens.weight")
    for name in ("lm_head", "model.embed_tokens"):
        tensors = {**saved, f"base_model.model.{name}.weight": embeddings}
        save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
        view = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
        assert view.config.tie_word_embeddings is False
        assert "lm_head.weight" in view.names()
        for own in ("lm_head", "model.embed_tokens"):
            wanted = embeddings if own == name else old
            torch.testing.assert_close(view.tensor(f"{own}.weight"), wanted, rtol=0, atol=0)


def test_a_delta_is_extracted_from_an_adapter(base: Path, tmp_path: Path) -> None:
    merged = build_adapter(base, tmp_path / "adapter", modules_to_save=["model.norm"])
    done = llmpress("delta", "extract", base, tmp_path / "adapter", "-o", tmp_path / "delta")
    assert done.code == 0, done.err
    delta = DeltaFolder(tmp_path / "delta", "delta")
    assert len(delta.header["linears"]) == 2 * len(TARGETS)
    assert delta.exact_names() == ["model.norm.weight"]
    adapter = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    finetuned = {"name": "adapter", "fingerprint": adapter.fingerprint}
    assert delta.header["finetuned"] == finetuned
    assert read_provenance(tmp_path / "delta")["settings"]["adapter"] == adapter.fingerprint
    view = FinetunedCheckpoint(Checkpoint(base), delta)
    for name, expected in merged.items():
        torch.testing.assert_close(view.tensor(name), expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    assert adapter.fingerprint != finetuned["fingerprint"]


def test_an_adapter_with_provenance_is_an_input(base: Path, tmp_path: Path) -> None:
    build_adapter(base, tmp_path / "plain")
    with artifact_folder(tmp_path / "adapter", stage="test", settings={}, inputs={}) as folder:
        shutil.copytree(tmp_path / "plain", folder, dirs_exist_ok=True)
    extract_delta(base, tmp_path / "adapter", out=tmp_path / "delta")
    made = read_provenance(tmp_path / "adapter")["fingerprint"]
    record = read_provenance(tmp_path / "delta")
    assert record["inputs"]["finetuned"] == made
    assert DeltaFolder(tmp_path / "delta", "delta").header["finetuned"]["fingerprint"] == made


A, B = (f"{PREFIX}{QUERY}.lora_{side}.weight" for side in "AB")
Break = Callable[[dict[str, Any], dict[str, Tensor]], object]

BROKEN: dict[str, tuple[Break, type[Exception], str]] = {
    "dora": (lambda c, _: c.update(use_dora=True), ArtifactError, "lora_magnitude"),
    "tokens": (
        lambda c, _: c.update(trainable_token_indices=[1]),
        ArtifactError,
        "trainable_token",
    ),
    "no pattern": (lambda c, _: c.update(rank_pattern={"(": 2}), ArtifactError, "adapter_config"),
    "no mapping": (lambda c, _: c.update(alpha_pattern=[2]), ArtifactError, "alpha_pattern"),
    "no rank": (lambda c, _: c.update(r="x"), ArtifactError, "r is 'x'"),
    "no target": (lambda c, _: c.update(target_modules=["v_proj"]), ArtifactError, "target"),
    "other block": (lambda c, _: c.update(layers_to_transform=[0]), ArtifactError, "target"),
    "parameters": (lambda c, _: c.update(target_parameters=["x"]), SourceError, "target_param"),
    "other type": (lambda c, _: c.update(peft_type="IA3"), SourceError, "IA3"),
    "no alpha": (lambda c, _: c.pop("lora_alpha"), ArtifactError, "lora_alpha"),
    "other rank": (lambda c, _: c.update(r=5), ArtifactError, "down_proj.* rank 5"),
    "cut": (lambda _, t: t.update({A: t[A][:, :-1]}), ArtifactError, r"q_proj.* \[4, 31\]"),
    "no factor": (lambda _, t: t.pop(A), ArtifactError, "q_proj"),
    "no linear": (
        lambda _, t: t.update({n.replace("q_proj", "x"): t.pop(n) for n in (A, B)}),
        ArtifactError,
        r"\.x",
    ),
    "no tensor": (
        lambda _, t: t.update({f"{PREFIX}x.lora_embedding_A": torch.ones(2)}),
        ArtifactError,
        "x.lora_embedding_A",
    ),
    "other vocabulary": (
        lambda _, t: t.update({f"{PREFIX}lm_head.weight": torch.ones(97, 32)}),
        ArtifactError,
        r"lm_head\.weight .*97",
    ),
    "nan": (lambda _, t: t[A].fill_(torch.nan), NumericalError, "q_proj"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_cannot_be_merged_are_refused(name: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    build_adapter(base, folder)
    change, error, message = BROKEN[name]
    config = read_json(folder / "adapter_config.json")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    write_json(folder / "adapter_config.json", config)
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors")
    with pytest.raises(error, match=message) as caught:
        extract_delta(base, folder, out=tmp_path / "delta")
    assert str(folder) in str(caught.value)
    assert not (tmp_path / "delta").exists()


def test_damaged_weights_of_an_adapter_are_named(base: Path, tmp_path: Path) -> None:
    build_adapter(base, tmp_path / "adapter")
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors"):
        AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors"):
        AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")


def compressed(base: Path, root: Path, method: str, settings: dict[str, Any], names: str) -> Path:
    """A compressed delta of a model whose parameters of these names are others."""
    model = load_model(base)
    disturb([p for name, p in model.named_parameters() if names in name], 0.05)
    model.save_pretrained(root / "tuned")
    extract_delta(base, root / "tuned", out=root / "delta")
    compress_delta(
        root / "delta",
        method=build_method(method, settings, method),
        seed=0,
        device=torch.device("cpu"),
        scratch=root / "scratch",
        out=root / "small",
    )
    return root / "small"


@pytest.mark.parametrize(
    ("method", "settings"),
    [("svd", {"rank": 6}), ("delta_come", {"bits": 4.0, "group_size": 16})],
    ids=["svd", "delta_come"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_peft_opens_an_exported_delta(
    method: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
    base: Path,
    tmp_path: Path,
) -> None:
    small = compressed(base, tmp_path, method, settings, "_proj.weight")
    export_adapter(small, out=tmp_path / "adapter", dtype=dtype)
    adapted = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    windows = torch.arange(90).view(3, 30)
    with torch.inference_mode():
        expected = load_delta(load_model(base), small)(windows).logits
        before = load_model(base)(windows).logits
        error = (adapted(windows).logits - expected).norm() / (before - expected).norm()
    assert error < tolerance
    opened = DeltaFolder(small, "compressed_delta")
    view = AdapterCheckpoint(Checkpoint(base), tmp_path / "adapter")
    for name in opened.header["layers"]:
        change = view.tensor(f"{name}.weight") - Checkpoint(base).tensor(f"{name}.weight")
        wanted = delta_layer(name, opened).dequantize()
        assert (change - wanted).norm() < tolerance * wanted.norm()


def test_all_layers_have_one_rank_and_empty_ones_none(base: Path, tmp_path: Path) -> None:
    layers = {
        QUERY: LowRankLinear.from_factors(torch.randn(32, 5), torch.randn(5, 32), "float32"),
        "model.layers.0.self_attn.q_proj": LowRankLinear.from_factors(
            torch.randn(32, 2), torch.randn(2, 32), "float32"
        ),
        DOWN: MixedLowRankLinear(48, 32, groups=[], group_size=16),
    }
    write_delta(tmp_path / "small", base, layers)
    export_adapter(tmp_path / "small", out=tmp_path / "adapter", dtype=torch.float32)
    config = read_json(tmp_path / "adapter/adapter_config.json")
    assert config["r"] == config["lora_alpha"] == 5
    assert not {"rank_pattern", "alpha_pattern"} & set(config)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {5}
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj", QUERY]
    wrapped = peft.PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    for name, layer in layers.items():
        expected = Checkpoint(base).tensor(f"{name}.weight")
        if name != DOWN:
            expected = expected + layer.dequantize()
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_largest_rank_keeps_the_best_and_says_what_it_loses(
    rank: int, base: Path, tmp_path: Path
) -> None:
    layers = {
        QUERY: LowRankLinear.from_factors(torch.randn(32, 5), torch.randn(5, 32), "float32"),
        DOWN: LowRankLinear.from_factors(torch.randn(48, 2), torch.randn(2, 32), "float32"),
    }
    write_delta(tmp_path / "small", base, layers)
    out = export_adapter(
        tmp_path / "small", out=tmp_path / "adapter", dtype=torch.float32, max_rank=rank
    )
    tensors = load_file(out / "adapter_model.safetensors")
    lost = whole = 0.0
    for name, layer in layers.items():
        right, left = (tensors[f"{PREFIX}{name}{side}"] for side in FACTORS)
        assert len(right) == left.shape[1] == rank
        weight = layer.dequantize().double()
        best = torch.linalg.svdvals(weight)[rank:].square().sum()
        error = (left.double() @ right.double() - weight).square().sum()
        torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-8)
        lost, whole = lost + float(best), whole + float(weight.square().sum())
    said = read_provenance(out)["settings"]
    assert said["rank"] == rank
    assert said["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-5)


def test_a_largest_rank_of_none_is_refused(base: Path, tmp_path: Path) -> None:
    write_delta(
        tmp_path / "small", base, {QUERY: MixedLowRankLinear(32, 32, groups=[], group_size=16)}
    )
    with pytest.raises(ConfigError, match="max_rank"):
        export_adapter(tmp_path / "small", out=tmp_path / "adapter", max_rank=0)


def write_delta(out: Path, base: Path, layers: dict[str, Any]) -> None:
    """Write a compressed delta of these layers."""
    identity = {"name": base.name, "fingerprint": Checkpoint(base).fingerprint}
    entries = {
        name: {"kind": n.kind, "spec": n.spec(), "shape": [n.out_features, n.in_features]}
        for name, n in layers.items()
    }
    header = {"base": identity, "finetuned": identity, "exact": {}, "exact_rows": {}}
    with artifact_folder(out, stage="test", settings={}, inputs={}) as folder:
        writer = DeltaWriter(folder)
        for name, layer in layers.items():
            for key, tensor in layer.tensors().items():
                writer.add(f"{name}.{key}", tensor)
        writer.close("compressed_delta", {**header, "layers": entries})


def test_what_no_adapter_can_hold_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    small = compressed(base, tmp_path, "rtn", {"num_bits": 4, "group_size": 16}, "q_proj.weight")
    with pytest.raises(ArtifactError, match=r"q_proj .*quantized"):
        export_adapter(small, out=tmp_path / "adapter")
    layer = LowRankLinear.from_factors(torch.randn(32, 5), torch.randn(5, 32))
    write_delta(tmp_path / "moe", base, {"model.layers.0.mlp.experts.3.down_proj": layer})
    with pytest.raises(ArtifactError, match=r"experts\.3\.down_proj"):
        export_adapter(tmp_path / "moe", out=tmp_path / "adapter")
    empty = MixedLowRankLinear(32, 32, groups=[], group_size=16)
    write_delta(tmp_path / "empty", base, {QUERY: empty})
    with pytest.raises(ArtifactError, match="rank 0"):
        export_adapter(tmp_path / "empty", out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_tensors_kept_exactly_are_named_in_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = compressed(base, tmp_path, "svd", {"rank": 3}, "layers.1")
    out = tmp_path / "adapter"
    with caplog.at_level(logging.WARNING, "llmpress"):
        done = llmpress("delta", "export", small, "-o", out, "--base-name", "owner/base", "--json")
    assert done.json["dtype"] == "bfloat16"
    names = DeltaFolder(small, "compressed_delta").exact_names()
    assert len(names) == 6
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "llmpress.export.adapter"]
    assert "lacks 6 tensors" in warning
    assert all(name in warning for name in names)
    assert read_provenance(out)["settings"]["not_in_the_adapter"] == names
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "owner/base"
