"""End-to-end finetuning of tiny models: what changes, what is kept, what it repeats and resumes."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_artifacts import Make
from tiny_models import library_text
from torch import nn
from transformers import AutoModelForCausalLM

import llmpress
from llmpress.core.artifacts import PROVENANCE, read_json, read_provenance, verify
from llmpress.core.errors import ArtifactError, ConfigError, NumericalError
from llmpress.data.corpora import CalibrationText
from llmpress.data.tasks.arithmetic import generate
from llmpress.deltas.compression import compress_delta
from llmpress.evaluation.sizes import trained_size
from llmpress.methods.registry import build_method
from llmpress.models import adapters
from llmpress.nn.layers import AdaptedLinear
from llmpress.nn.layers.quantized import QuantizedLinear
from llmpress.training import stage
from llmpress.training.data import text_data
from llmpress.training.examples import collate
from llmpress.training.objectives import model_loss
from llmpress.training.settings import FinetuningSettings, Trains
from llmpress.training.stage import train_model
from llmpress.training.trainables import delta_parameters

ITEMS = generate(40, 1, 0)["train"]
BASE = {"steps": 6, "batch_size": 2, "warmup": 1, "held_out": 4, "check_every": 2, "length": 24}

Tune = Callable[..., Path]


@pytest.fixture
def tune(tiny_model_folder: Path, compressed: Make, tmp_path: Path) -> Tune:
    """Finetune the tiny model on a few worked answers, or on text."""

    def run(
        name: str = "out",
        trains: Trains = "compressed",
        *,
        start: str = "cluscomp",
        rate: float = 3e-2,
        text: bool = False,
        seed: int = 0,
        **changes: Any,
    ) -> Path:
        values: dict[str, Any] = {**BASE, "learning_rate": rate, **changes}
        part = CalibrationText(library_text(("xml",)), library_text(("asyncio",)))
        return train_model(
            compressed(start) if trains == "compressed" else tiny_model_folder,
            original=tiny_model_folder,
            trains=trains,
            text={"code": part} if text else None,
            items=None if text else ITEMS,
            record={"task": "arithmetic"},
            out=tmp_path / name,
            scratch=tmp_path / "scratch",
            seed=seed,
            device="cpu",
            force=True,
            **values,
        )

    return run


def tensors(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert {name: t.dtype for name, t in old.items()} == {n: t.dtype for n, t in new.items()}
    return {name for name in old if (old[name] != new[name]).any()}


@pytest.mark.parametrize(
    ("start", "norms", "trained"),
    [
        ("cluscomp", False, (".codebook", ".scales")),
        ("cluscomp", True, (".codebook", ".scales", "norm.weight")),
        ("lillama", False, (".A", ".B")),
    ],
    ids=["codebooks", "and-norms", "factors"],
)
def test_only_what_may_train_changes_and_the_loss_falls(
    tune: Tune, compressed: Make, start: str, norms: bool, trained: tuple[str, ...]
) -> None:
    rate = 3e-2 if start == "cluscomp" else 2e-2
    out = tune(start=start, norms=norms, rate=rate)
    names = changed(compressed(start), out)
    assert names == {name for name in tensors(out) if name.endswith(trained)}
    record = read_json(out / "training.json")
    assert record["loss_after"] < 0.97 * record["loss_before"]
    assert record["loss_after"] == min(loss for _, loss in record["held_out"])
    assert [step for step, _ in record["held_out"]] == [0, 2, 4, 6]
    assert len(record["losses"]) == 6
    count = sum(tensors(out)[name].numel() for name in names)
    assert record["trainable_parameters"] == count
    assert record["trainable_share"] == count / record["model_parameters"]


def compressed_delta(delta: Path, out: Path, method: str, settings: dict[str, Any]) -> Path:
    compress_delta(
        delta,
        method=build_method(method, settings, out.name),
        seed=0,
        device=torch.device("cpu"),
        scratch=out.parent / "scratch",
        out=out,
    )
    return out


@pytest.fixture(scope="module")
def signs(tiny_delta: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny delta as signs and scales."""
    out = tmp_path_factory.mktemp("signs") / "signs"
    return compressed_delta(tiny_delta, out, "bitdelta", {"scale": "mean"})


@pytest.fixture
def distill(
    signs: Path, tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> Tune:
    """Train the scales of the tiny delta on the predictions of the fine-tuned model."""

    def run(name: str = "out", start: Path = signs, **changes: Any) -> Path:
        given: dict[str, Any] = {"base": tiny_model_folder, "original": tiny_finetuned_folder}
        roles = {role: changes.pop(role, folder) for role, folder in given.items()}
        values = {**BASE, "learning_rate": 3e-2, "objective": "distillation", "windows": 8}
        part = CalibrationText(library_text(("xml",)), library_text(("asyncio",)))
        return train_model(
            start,
            **roles,
            trains="delta",
            text={"code": part},
            record={"start": "compressed/signs"},
            out=tmp_path / name,
            scratch=tmp_path / "scratch",
            device="cpu",
            force=True,
            **(values | changes),
        )

    return run


def test_of_a_delta_only_the_scales_change_and_it_comes_closer(distill: Tune, signs: Path) -> None:
    out = distill()
    old, new = (load_file(folder / "delta.safetensors") for folder in (signs, out))
    assert old.keys() == new.keys()
    assert {n: t.dtype for n, t in old.items()} == {n: t.dtype for n, t in new.items()}
    changed = {name for name in old if (old[name] != new[name]).any()}
    assert changed == {name for name in old if name.endswith(".scale")}
    assert len(changed) == 21
    record = read_json(out / "training.json")
    assert 0 < record["loss_after"] < 0.97 * record["loss_before"]
    assert record["trainable_parameters"] == 21
    assert read_json(out / "delta.json") == read_json(signs / "delta.json")
    provenance = read_provenance(out)
    assert provenance["inputs"].keys() == {"start", "model", "base"}
    assert (provenance["stage"], provenance["settings"]["method"]) == ("train", "bitdelta")


def test_of_singular_triplets_the_scales_of_the_vectors_change(
    distill: Tune, tiny_delta: Path, tmp_path: Path
) -> None:
    settings = {"bits": 1.0, "precisions": [4, 2], "group_size": 32}
    start = compressed_delta(tiny_delta, tmp_path / "triplets", "delta_come", settings)
    out = distill(start=start)
    old, new = (load_file(folder / "delta.safetensors") for folder in (start, out))
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
        n: (t.dtype, t.shape) for n, t in new.items()
    }
    changed = {name for name in old if (old[name] != new[name]).any()}
    scales = {name for name in old if name.endswith("_scales")}
    assert changed == scales
    record = read_json(out / "training.json")
    assert record["loss_after"] < 0.97 * record["loss_before"]
    assert record["trainable_parameters"] == sum(old[name].numel() for name in scales)


def test_the_loss_of_a_delta_is_that_of_the_loaded_result(
    distill: Tune, tiny_model_folder: Path, tiny_finetuned_folder: Path
) -> None:
    out = distill(steps=2)
    record = read_json(out / "training.json")
    assert record["settings"]["precision"] == "float32"
    loaded = llmpress.load_model(tiny_model_folder, dtype=torch.float32)
    llmpress.load_delta(loaded, out)
    teacher = llmpress.load_model(tiny_finetuned_folder, dtype=torch.float32)
    settings = FinetuningSettings(**BASE, learning_rate=1.0, windows=8)
    part = CalibrationText(library_text(("xml",)), library_text(("asyncio",)))
    tokenizer = llmpress.load_tokenizer(tiny_finetuned_folder)
    tokens, labels = collate(text_data({"code": part}, tokenizer, settings, 0).held_out)
    with torch.no_grad():
        loss = model_loss(loaded, tokens, labels, teacher=teacher)
    assert record["best_step"] == 2
    assert float(loss) == pytest.approx(record["loss_after"], rel=1e-4)


def test_a_killed_distillation_of_a_delta_continues_to_the_same_bytes(
    distill: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(distill())
    shutil.rmtree(tmp_path / "out")
    stop_at(4, monkeypatch)
    with pytest.raises(Killed):
        distill()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002.safetensors"]
    assert content(distill()) == whole


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"base": "finetuned"}, ArtifactError, "base"),
        ({"original": "base"}, ArtifactError, "finetuned"),
        ({"base": None}, ConfigError, "`base`"),
        ({"objective": "next_token"}, ValueError, "objective: .*distillation"),
        ({"start": "base"}, ArtifactError, "delta"),
    ],
    ids=["other-base", "other-model", "no-base", "text", "no-delta"],
)
def test_deltas_that_do_not_fit(
    distill: Tune,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[Exception],
    says: str,
) -> None:
    folders = {"base": tiny_model_folder, "finetuned": tiny_finetuned_folder}
    with pytest.raises(kind, match=says):
        distill(**{key: folders.get(value, value) for key, value in changes.items()})
    assert list(tmp_path.iterdir()) == []


def test_a_delta_without_floats_has_nothing_to_train(tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    linear = model.model.layers[0].mlp.up_proj
    layer = QuantizedLinear(linear.in_features, linear.out_features, num_bits=4, group_size=16)
    model.model.layers[0].mlp.up_proj = AdaptedLinear(linear, layer)
    with pytest.raises(ConfigError, match=r"\(quantized\)"):
        delta_parameters(model)


def test_the_result_opens_with_transformers_and_is_verified(tune: Tune, compressed: Make) -> None:
    out = tune(steps=2)
    model = AutoModelForCausalLM.from_pretrained(out)
    layer = model.model.layers[0].mlp.up_proj
    torch.testing.assert_close(
        layer.codebook.data, tensors(out)["model.layers.0.mlp.up_proj.codebook"], atol=0, rtol=0
    )
    assert verify(out)["stage"] == "train"
    assert read_provenance(out)["inputs"].keys() == {"start", "model"}
    before, after = (read_json(f / "layers.json")["totals"] for f in (compressed("cluscomp"), out))
    assert before == after
    assert llmpress.load_model(out).config.quantization_config.layers


def test_distillation_brings_a_model_closer_to_its_original(tune: Tune) -> None:
    record = read_json(
        tune(text=True, objective="distillation", rate=3e-3, windows=8) / "training.json"
    )
    assert 0 < record["loss_after"] < 0.97 * record["loss_before"]


def test_a_result_is_never_worse_than_its_start(tune: Tune, compressed: Make) -> None:
    out = tune(rate=100.0, warmup=0, precision="float32", max_grad_norm=1e6)
    record = read_json(out / "training.json")
    assert record["best_step"] == 0
    assert record["loss_after"] == record["loss_before"]
    assert min(loss for _, loss in record["held_out"][1:]) > record["loss_before"]
    assert changed(compressed("cluscomp"), out) == set()


def test_a_start_in_fp32_is_kept_too(distill: Tune, signs: Path) -> None:
    out = distill(learning_rate=100.0, warmup=0, max_grad_norm=1e6)
    assert read_json(out / "training.json")["best_step"] == 0
    old, new = (load_file(folder / "delta.safetensors") for folder in (signs, out))
    torch.testing.assert_close(new, old, atol=0, rtol=0)


@pytest.mark.parametrize("trains", ["compressed", "lora"])
def test_a_batch_in_parts_gives_the_same_but_for_rounding(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, trains: Trains
) -> None:
    whole = tune("whole", trains, precision="float32")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    parts = tune("parts", trains, precision="float32")
    first, second = (read_json(out / "training.json") for out in (whole, parts))
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert second["loss_after"] == pytest.approx(first["loss_after"], rel=1e-3)
    first, second = (read_provenance(out)["settings"] for out in (whole, parts))
    assert second == {**first, "gradient_accumulation_steps": 2}
    with pytest.raises(ConfigError, match="batch_size 3"):
        tune("uneven", trains, batch_size=3)


def test_held_out_loss_is_that_of_the_stored_values(tune: Tune) -> None:
    first = read_json(tune("first", steps=2) / "training.json")
    settings = {"steps": 1, "rate": 1e-9, "check_every": 1}
    assert first["best_step"] == 2
    again = read_json(tune("again", start="cluscomp", **settings) / "training.json")
    assert again["loss_before"] == first["loss_before"]


def content(folder: Path) -> dict[str, bytes]:
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != PROVENANCE]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


@pytest.mark.parametrize("trains", ["compressed", "lora"])
def test_same_seed_same_bytes(tune: Tune, trains: Trains) -> None:
    first, again, other = (
        content(tune(name, trains, steps=2, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert first != other


class Killed(BaseException):
    """Stands for a signal: nothing in the code under test catches it."""


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die once, in the middle of that step."""
    clip, calls = Accelerator.clip_grad_norm_, itertools.count(1)

    def dying(self: Accelerator, *arguments: Any) -> Any:
        if next(calls) == step:
            raise Killed
        return clip(self, *arguments)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", dying)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step that is taken."""
    taken: list[int] = []
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *arguments: Any) -> Any:
        taken.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return taken


def checkpoints(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "scratch").glob("*/step-*.safetensors"))


@pytest.mark.parametrize("trains", ["compressed", "lora"])
def test_a_rerun_after_a_kill_continues_and_gives_the_same_bytes(
    tune: Tune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
    trains: Trains,
) -> None:
    whole = content(tune("out", trains))
    shutil.rmtree(tmp_path / "out")
    stop_at(4, monkeypatch)
    with pytest.raises(Killed):
        tune("out", trains)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002.safetensors"]
    assert not (tmp_path / "out").exists()
    steps.clear()
    assert content(tune("out", trains)) == whole
    assert len(steps) == 4
    assert not (tmp_path / "scratch").exists()


def test_a_rerun_knows_a_best_state_from_before_the_checkpoint(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    def judged(model: nn.Module, *arguments: Any, **more: Any) -> torch.Tensor:
        away = 0 if model.training else abs(len(steps) - 2)
        return loss(model, *arguments, **more) + away

    loss = stage.model_loss
    monkeypatch.setattr(stage, "model_loss", judged)
    whole = content(tune())
    assert read_json(tmp_path / "out" / "training.json")["best_step"] == 2
    shutil.rmtree(tmp_path / "out")
    stop_at(6, monkeypatch)
    steps.clear()
    with pytest.raises(Killed):
        tune()
    assert checkpoints(tmp_path)[-1].name == "step-000004.safetensors"
    del steps[4:]
    assert content(tune()) == whole


def test_a_damaged_checkpoint_is_not_continued_from(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    whole = content(tune())
    shutil.rmtree(tmp_path / "out")
    stop_at(6, monkeypatch)
    with pytest.raises(Killed):
        tune()
    second, fourth = checkpoints(tmp_path)
    fourth.with_suffix(".json").unlink()
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    steps.clear()
    assert content(tune()) == whole
    assert len(steps) == 6


def test_checkpoints_hold_the_trained_values_alone(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(4, monkeypatch)
    with pytest.raises(Killed):
        tune()
    [checkpoint] = checkpoints(tmp_path)
    stored = load_file(checkpoint)
    assert {name.partition("/")[0] for name in stored} == {
        *("best", "value", "step", "exp_avg", "exp_avg_sq")
    }
    values = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith("value/")}
    assert values.keys() == {"codebook", "scales"}
    assert {tensor.dtype for tensor in values.values()} == {torch.float32}


def test_a_loss_that_is_not_finite_names_the_rate(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = stage.model_loss
    monkeypatch.setattr(
        stage, "model_loss", lambda *a, **k: loss(*a, **k) * (torch.nan if a[0].training else 1)
    )
    with pytest.raises(NumericalError, match=r"nan.* 1.*`learning_rate`"):
        tune()
    monkeypatch.setattr(stage, "model_loss", lambda *a, **k: loss(*a, **k) * torch.inf)
    with pytest.raises(NumericalError, match=r"inf.* 0 .*`learning_rate`"):
        tune()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trains", ["lora", "qlora"])
def test_adapters(tune: Tune, tiny_model_folder: Path, trains: Trains) -> None:
    out = tune(trains=trains, rate=1e-2)
    record = read_json(out / "training.json")
    assert record["loss_after"] < 0.97 * record["loss_before"]
    assert record["best_step"] > 0
    stored = load_file(out / adapters.ADAPTER_WEIGHTS)
    assert record["trainable_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}

    beside = adapters.load_adapted(out, tiny_model_folder, dtype=torch.float32, device="cpu")
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = beside(tokens).logits
        dense = adapters.merged(beside, torch.float32)
        # NF4 linears multiply in bf16
        tolerance = {"atol": 1e-4, "rtol": 1e-4} if trains == "lora" else {"atol": 0.3, "rtol": 0.1}
        torch.testing.assert_close(dense(tokens).logits, expected, **tolerance)
        original = llmpress.load_model(tiny_model_folder)(tokens).logits
    assert (dense(tokens).logits - original).abs().max() > 0.1
    assert dense.to(torch.bfloat16).dtype == torch.bfloat16

    size = trained_size(out, tiny_model_folder)
    base = (out / "base" if trains == "qlora" else tiny_model_folder) / "model.safetensors"
    assert size.model_bytes == sum(f.stat().st_size for f in (base, out / adapters.ADAPTER_WEIGHTS))
    # every tensor stored for the linears: NF4's scales and their tables are of that name too
    linears = {k: t for k, t in load_file(base).items() if "_proj.weight" in k}
    assert len(linears) == (21 if trains == "lora" else 21 * 6)
    stored_bytes = sum(t.numel() * t.element_size() for t in (*linears.values(), *stored.values()))
    assert size.stored_bits == 8 * stored_bytes


def test_peft_opens_an_adapter(tune: Tune, tiny_model_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tune(trains="lora", steps=2, rate=5e-3)
    model = llmpress.load_model(tiny_model_folder)
    with adapters.calm():
        wrapped = peft.PeftModel.from_pretrained(model, out)
    layer = wrapped.base_model.model.model.layers[1].self_attn.v_proj
    stored = load_file(out / adapters.ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    torch.testing.assert_close(layer.lora_B["default"].weight.data, stored[name].float())
    assert stored[name].abs().max() > 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize(("trains", "package"), [("lora", "peft"), ("qlora", "bitsandbytes")])
def test_a_missing_package_says_how_to_install_it(
    tune: Tune, monkeypatch: pytest.MonkeyPatch, trains: Trains, package: str
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(adapters.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"{package} .*: pip install 'llmpress\[adapters\]'"):
        tune(trains=trains)


@pytest.mark.parametrize(
    ("start", "trains", "kind", "says"),
    [
        ("rtn", "compressed", ConfigError, r"\(quantized\)"),
        ("model", "compressed", ArtifactError, "compress"),
        ("cluscomp", "lora", ArtifactError, "lora"),
        ("other", "compressed", ArtifactError, "another model"),
    ],
)
def test_starts_that_do_not_fit(
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    compressed: Make,
    tmp_path: Path,
    start: str,
    trains: Trains,
    kind: type[Exception],
    says: str,
) -> None:
    model = tiny_finetuned_folder if start == "other" else tiny_model_folder
    folder = {"model": tiny_model_folder, "other": compressed("cluscomp")}.get(start)
    with pytest.raises(kind, match=says):
        train_model(
            folder or compressed(start),
            original=model,
            trains=trains,
            items=ITEMS,
            steps=1,
            learning_rate=1e-3,
            held_out=4,
            out=tmp_path / "out",
            scratch=tmp_path / "scratch",
            device="cpu",
        )
    assert list(tmp_path.iterdir()) == []
