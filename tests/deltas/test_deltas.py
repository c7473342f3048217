import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from llmpress.core.artifacts import artifact_folder, read_json, write_json
from llmpress.core.errors import ArtifactError, ConfigError, NumericalError
from llmpress.core.resume import BlockStore
from llmpress.deltas.applying import load_delta, remove_delta
from llmpress.deltas.compression import write_compressed_delta
from llmpress.deltas.extraction import write_delta
from llmpress.methods.base import Method
from llmpress.methods.delta_come import DeltaCoMe
from llmpress.methods.svd import SVD
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import dequantized
from llmpress.nn.layers import AdaptedLinear

LINEARS = 3 * 7
EXACT = SVD(keep=1.0)
"""Low rank of half the full one in bf16: near enough to tell an applied delta from none."""

Edit = Callable[[dict[str, Tensor], dict[str, object]], None]


def as_artifact(source: Path, out: Path, edit: Edit | None = None) -> Path:
    """A model folder with provenance; ``edit`` changes its tensors and its config first."""
    with artifact_folder(out, stage="test", settings={}, inputs={}) as folder:
        for file in source.iterdir():
            shutil.copy(file, folder / file.name)
        if edit is not None:
            tensors = load_file(folder / "model.safetensors")
            config = read_json(folder / "config.json")
            edit(tensors, config)
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            write_json(folder / "config.json", config)
    return out


@pytest.fixture(scope="session")
def base(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_artifact(tiny_model_folder, tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def finetuned(tiny_finetuned_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_artifact(tiny_finetuned_folder, tmp_path_factory.mktemp("tuned") / "tiny-tuned")


def extracted(base: Path, finetuned: Path, out: Path, **options: int) -> Path:
    inputs = {"base": base, "finetuned": finetuned}
    with artifact_folder(out, stage="extract_delta", settings={}, inputs=inputs) as folder:
        write_delta(Checkpoint(base), Checkpoint(finetuned), folder, **options)
    return out


def compressed(delta: Path, method: Method, out: Path, **options: int) -> Path:
    store = BlockStore("test", {}, out.parent / "scratch")
    inputs = {"delta": delta}
    with artifact_folder(out, stage="compress_delta", settings={}, inputs=inputs) as folder:
        write_compressed_delta(
            DeltaFolder(delta, "delta"),
            method,
            None,
            folder,
            method_name="test",
            seed=0,
            store=store,
            **options,
        )
    store.clear()
    return out


def both_steps(base: Path, finetuned: Path, root: Path, method: Method = EXACT) -> Path:
    return compressed(extracted(base, finetuned, root / "delta"), method, root / "compressed")


def model(folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    output: Tensor = model(windows).logits
    return output


def test_linears_are_subtracted_and_the_rest_is_kept_exactly(
    base: Path, finetuned: Path, tmp_path: Path
) -> None:
    delta = DeltaFolder(extracted(base, finetuned, tmp_path / "delta"), "delta")
    old, new = Checkpoint(base), Checkpoint(finetuned)
    assert len(delta.header["linears"]) == LINEARS
    assert delta.header["unchanged"] == ["model.embed_tokens.weight"]
    assert len(delta.exact_names()) == 7  # two norms a block and the last one
    for name in delta.header["linears"]:
        found = delta.tensor(f"{name}.weight") + old.tensor(f"{name}.weight")
        torch.testing.assert_close(found, new.tensor(f"{name}.weight"), rtol=0, atol=1e-6)
    for name in delta.exact_names():
        torch.testing.assert_close(delta.tensor(f"exact.{name}"), new.tensor(name), rtol=0, atol=0)
    for side, folder in (("base", base), ("finetuned", finetuned)):
        fingerprint = Checkpoint(folder).fingerprint
        assert delta.header[side] == {"name": folder.name, "fingerprint": fingerprint}


def test_shards_hold_the_same_and_memory_stays_one_shard(
    base: Path, finetuned: Path, tmp_path: Path
) -> None:
    whole = DeltaFolder(extracted(base, finetuned, tmp_path / "whole"), "delta")
    shard = 64 * 1024
    cut = DeltaFolder(extracted(base, finetuned, tmp_path / "cut", max_shard_bytes=shard), "delta")
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < shard + 4096
    assert cut.names() == whole.names()
    for name in whole.names():
        torch.testing.assert_close(cut.tensor(name), whole.tensor(name), rtol=0, atol=0)


def test_a_loaded_delta_turns_the_base_into_the_finetuned_and_goes_without_a_trace(
    base: Path, finetuned: Path, tmp_path: Path, tiny_windows: Tensor
) -> None:
    folder = both_steps(base, finetuned, tmp_path)
    adapted, target = model(base), logits(model(finetuned), tiny_windows)
    before = logits(adapted, tiny_windows)
    names = [name for name, _ in adapted.named_parameters()]
    load_delta(adapted, folder, base_folder=base)
    assert sum(isinstance(m, AdaptedLinear) for m in adapted.modules()) == LINEARS
    distance = (logits(adapted, tiny_windows) - target).norm()
    assert distance < 0.01 * (before - target).norm()
    remove_delta(adapted)
    torch.testing.assert_close(logits(adapted, tiny_windows), before, rtol=0, atol=0)
    assert [name for name, _ in adapted.named_parameters()] == names


def test_layers_json_says_what_lies_on_disk(base: Path, finetuned: Path, tmp_path: Path) -> None:
    folder = both_steps(base, finetuned, tmp_path, DeltaCoMe(bits=3.0))
    record = read_json(folder / "layers.json")
    tensors = load_file(folder / "delta.safetensors")
    packed = {name: t for name, t in tensors.items() if not name.startswith("exact.")}
    stored = sum(8 * t.numel() * t.element_size() for t in packed.values())
    totals = record["totals"]
    assert totals["stored_bits"] == sum(r["stored_bits"] for r in record["layers"]) == stored
    exact = sum(t.numel() * t.element_size() for n, t in tensors.items() if n not in packed)
    assert totals["exact_bytes"] == exact
    assert totals["bits_per_weight"] <= 3.0
    assert [row["method"] for row in record["layers"]] == ["test"] * LINEARS


def test_compressing_in_shards_loads_the_same(
    base: Path, finetuned: Path, tmp_path: Path, tiny_windows: Tensor
) -> None:
    delta = extracted(base, finetuned, tmp_path / "delta")
    whole = load_delta(model(base), compressed(delta, EXACT, tmp_path / "whole"))
    sharded = compressed(delta, EXACT, tmp_path / "cut", max_shard_bytes=32 * 1024)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    cut = load_delta(model(base), sharded)
    expected = logits(whole, tiny_windows)
    torch.testing.assert_close(logits(cut, tiny_windows), expected, rtol=0, atol=0)


def grow_vocabulary(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    embeddings = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([embeddings * 1.01, torch.ones(3, 64)])
    config["vocab_size"] = 515


def untie(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.9
    config["tie_word_embeddings"] = False


def add_biases(tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    for index in range(3):
        for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
            key = f"model.layers.{index}.self_attn.{name}.bias"
            tensors[key] = torch.linspace(-0.1, 0.1, size)
    config["attention_bias"] = True


@pytest.mark.parametrize("edit", [grow_vocabulary, untie, add_biases])
def test_what_is_no_linear_weight_is_taken_over_and_given_back(
    edit: Edit, base: Path, finetuned: Path, tmp_path: Path, tiny_windows: Tensor
) -> None:
    changed = as_artifact(finetuned, tmp_path / "changed", edit)
    folder = both_steps(base, changed, tmp_path)
    adapted, target = model(base), logits(model(changed), tiny_windows)
    before = logits(adapted, tiny_windows)
    load_delta(adapted, folder)
    after = logits(adapted, tiny_windows)
    assert after.shape == target.shape
    assert (after - target).norm() < 0.01 * (before - target[..., :512]).norm()
    remove_delta(adapted)
    torch.testing.assert_close(logits(adapted, tiny_windows), before, rtol=0, atol=0)
    assert adapted.config.vocab_size == adapted.vocab_size == 512
    assert adapted.lm_head.weight is adapted.model.embed_tokens.weight


def test_a_base_of_bf16_and_a_finetuned_of_fp32_fit(
    base: Path, finetuned: Path, tmp_path: Path
) -> None:
    def halve(tensors: dict[str, Tensor], _: dict[str, object]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    half = as_artifact(base, tmp_path / "half", halve)
    delta = DeltaFolder(extracted(half, finetuned, tmp_path / "delta"), "delta")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = Checkpoint(finetuned).tensor(name) - Checkpoint(base).tensor(name).bfloat16().float()
    torch.testing.assert_close(delta.tensor(name), expected, rtol=0, atol=0)
    assert delta.tensor("exact.model.norm.weight").dtype == torch.float32


def cut_a_linear(tensors: dict[str, Tensor], _: dict[str, object]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1]


def lose_a_tensor(tensors: dict[str, Tensor], _: dict[str, object]) -> None:
    del tensors["model.layers.2.self_attn.k_proj.weight"]


def poison(tensors: dict[str, Tensor], _: dict[str, object]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = torch.nan


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (cut_a_linear, ArtifactError, r"layers.1.mlp.up_proj.weight .*\[175, 64\]"),
        (lose_a_tensor, ArtifactError, r"'model.layers.2.self_attn.k_proj.weight'"),
        (poison, NumericalError, r"model.layers.0.mlp.down_proj.weight"),
    ],
    ids=["shape", "missing", "nan"],
)
def test_models_that_do_not_fit_are_refused(
    edit: Edit, error: type[Exception], message: str, base: Path, finetuned: Path, tmp_path: Path
) -> None:
    broken = as_artifact(finetuned, tmp_path / "broken", edit)
    with pytest.raises(error, match=message) as caught:
        extracted(base, broken, tmp_path / "delta")
    assert str(broken) in str(caught.value)
    assert not (tmp_path / "delta").exists()


def test_another_base_is_refused_by_name(base: Path, finetuned: Path, tmp_path: Path) -> None:
    folder = both_steps(base, finetuned, tmp_path)
    wrong = model(finetuned)
    with pytest.raises(ArtifactError, match=r"tiny .*tiny-tuned"):
        load_delta(wrong, folder)
    assert not any(isinstance(module, AdaptedLinear) for module in wrong.modules())


def test_a_second_delta_is_refused_until_the_first_is_removed(
    base: Path, finetuned: Path, tmp_path: Path
) -> None:
    folder = both_steps(base, finetuned, tmp_path)
    adapted = load_delta(model(base), folder)
    with pytest.raises(ArtifactError, match=re.escape(str(folder))):
        load_delta(adapted, folder)
    load_delta(remove_delta(adapted), folder)
    with pytest.raises(ArtifactError):
        remove_delta(model(base))
    with pytest.raises(ArtifactError, match="q_proj"):
        remove_delta(dequantized(adapted))


def test_damaged_folders_are_named(base: Path, finetuned: Path, tmp_path: Path) -> None:
    folder = both_steps(base, finetuned, tmp_path)
    with pytest.raises(ArtifactError, match=r"delta.* compressed_delta"):
        load_delta(model(base), tmp_path / "delta")
    with pytest.raises(ArtifactError, match=str(base)):
        DeltaFolder(base, "delta")
    header = read_json(folder / "delta.json")
    layer = header["layers"]["model.layers.0.self_attn.q_proj"]
    layer["spec"]["rank"] += 1
    (folder / "delta.json").write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match=r"delta\.json"):
        load_delta(model(base), folder)
    (folder / "provenance.json").unlink()  # what is caught without checksums
    with pytest.raises(ArtifactError, match=r"model.layers.0.self_attn.q_proj"):
        load_delta(model(base), folder)
    (folder / "delta.json").write_text(json.dumps({**header, "format_version": 9}))
    with pytest.raises(ArtifactError, match="version 9"):
        load_delta(model(base), folder)
    data = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(data[:-100])
    (folder / "delta.json").write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match=r"delta\.safetensors"):
        load_delta(model(base), folder)
    (folder / "delta.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"delta\.safetensors"):
        load_delta(model(base), folder)


def test_a_method_that_leaves_layers_dense_is_refused(
    base: Path, finetuned: Path, tmp_path: Path
) -> None:
    class Lazy(SVD):
        def plan(self, shapes, model_weights):  # type: ignore[no-untyped-def]
            del model_weights
            return dict.fromkeys(shapes)

    with pytest.raises(ConfigError, match="21 layers"):
        both_steps(base, finetuned, tmp_path, Lazy(rank=1))
