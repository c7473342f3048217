"""Every mistake a user can make: one line that names the thing and the remedy, nothing written.

Each case is a row of ``CASES``: what the user types in a folder made for the case, and what the
line must name.
"""

import json
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done, llmpress
from safetensors.torch import load_file, save_file
from tiny_artifacts import Make
from transformers import AutoModelForCausalLM, BertConfig, T5Config

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class World:
    """A folder of the test's own, holding what a case needs."""

    folder: Path
    model: Path
    finetuned: Path
    packed: Path
    delta: Path
    small_delta: Path
    calibration: Path

    def copy(self, source: Path, name: str = "copy") -> Path:
        """A copy that may be damaged."""
        return Path(shutil.copytree(source, self.folder / name))

    @property
    def out(self) -> Path:
        """Where a command would write."""
        return self.folder / "out"


@pytest.fixture
def world(
    tmp_path: Path,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    compressed: Make,
    tiny_delta: Path,
    compressed_delta: Path,
    calibration: Path,
) -> World:
    return World(
        tmp_path,
        tiny_model_folder,
        tiny_finetuned_folder,
        compressed("rtn"),
        tiny_delta,
        compressed_delta,
        calibration,
    )


def compress(world: World, *arguments: object, model: Path | None = None) -> Done:
    """Compress the tiny model by rtn unless told otherwise; a later option wins."""
    defaults = ["-m", "rtn", "--bits", 4, "-s", "group_size=16"] if "-m" not in arguments else []
    return llmpress("compress", model or world.model, *defaults, *arguments, "-o", world.out)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def poison(value: float) -> Callable[[World], Done]:
    def case(world: World) -> Done:
        model = world.copy(world.model)

        def change(weight: torch.Tensor) -> torch.Tensor:
            weight[3, 5] = value
            return weight

        edit_tensor(model, "model.layers.1.mlp.up_proj.weight", change)
        return compress(world, model=model)

    return case


def truncated(world: World) -> Done:
    model = world.copy(world.model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return compress(world, model=model)


def corrupted_header(world: World) -> Done:
    model = world.copy(world.model)
    weights = model / "model.safetensors"
    weights.write_bytes(b"\xff" * 16 + weights.read_bytes()[16:])
    return compress(world, model=model)


def corrupted_artifact(world: World) -> Done:
    packed = world.copy(world.packed)
    data = bytearray((packed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (packed / "model.safetensors").write_bytes(data)
    return llmpress("generate", packed, "x")


def other_architecture(config: Any) -> Callable[[World], Done]:
    def case(world: World) -> Done:
        model = world.copy(world.model)
        config.save_pretrained(model)
        return compress(world, model=model)

    return case


def unknown_architecture(world: World) -> Done:
    model = world.copy(world.model)
    edit_json(model / "config.json", model_type="nobody_knows", auto_map={"AutoConfig": "x.Y"})
    return compress(world, model=model)


def damaged_config(world: World) -> Done:
    model = world.copy(world.model)
    (model / "config.json").write_text("{")
    return compress(world, model=model)


def wrong_shape(world: World) -> Done:
    model = world.copy(world.model)
    edit_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda weight: weight[:-1])
    return llmpress("generate", model, "x")


def without_a_tensor(world: World) -> Path:
    model = world.copy(world.model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def pickle_only(world: World) -> Done:
    model = world.copy(world.model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return compress(world, model=model)


def no_tokenizer(world: World) -> Done:
    model = world.copy(world.model)
    for path in model.glob("tokenizer*"):
        path.unlink()
    return llmpress("generate", model, "x")


def other_shapes(world: World) -> Done:
    model = world.copy(world.model)
    edit_tensor(model, "model.layers.1.mlp.up_proj.weight", lambda weight: weight[:-1])
    return llmpress("delta", "extract", world.model, model, "-o", world.out)


def fewer_tensors(world: World) -> Done:
    model = world.copy(world.finetuned)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return llmpress("delta", "extract", world.model, model, "-o", world.out)


def text_file(world: World, content: bytes) -> Path:
    path = world.folder / "text.txt"
    path.write_bytes(content)
    return path


def calibrated(world: World, content: bytes) -> Done:
    path = text_file(world, content)
    return compress(world, "-m", "gptq", "--bits", 4, "--text", path)


def foreign_calibration(world: World) -> Done:
    return compress(world, "-m", "gptq", "--bits", 4, "--calibration", world.calibration,
                    model=world.finetuned)  # fmt: skip


def damaged_calibration(world: World) -> Done:
    folder = world.copy(world.calibration)
    moments = next(folder.glob("moments-*"))
    moments.write_bytes(moments.read_bytes()[:-1])
    return compress(world, "-m", "gptq", "--bits", 4, "--calibration", folder)


def finetune(world: World, *arguments: object, start: Path | None = None) -> Done:
    """Finetune the model packed by rtn on two answers unless told otherwise."""
    items = world.folder / "text.txt"
    items.write_text('{"query": "1", "target": " 2"}\n{"query": "2", "target": " 3"}\n')
    given = ["--original", world.model, "--items", items, "--steps", 1, "--lr", 0.01]
    given += ["--set", "held_out=1"]
    return llmpress("finetune", start or world.packed, *given, *arguments, "-o", world.out)


def finetune_unknown_items(world: World) -> Done:
    items = world.folder / "text.txt"
    items.write_text('{"question": "1"}\n' * 40)
    return llmpress("finetune", world.model, "--trains", "lora", "--items", items, "--steps", 1,
                    "--lr", 0.01, "-o", world.out)  # fmt: skip


CASES: dict[str, tuple[Callable[[World], Done], str]] = {
    "unknown method": (
        lambda w: compress(w, "-m", "gptk"),
        "'gptk'.* 'gptq'",
    ),
    "unknown setting": (
        lambda w: compress(w, "-s", "grup_size=8"),
        "'grup_size'.* 'group_size'",
    ),
    "setting of a wrong type": (
        lambda w: compress(w, "-s", "group_size=many"),
        "group_size.* 'many'",
    ),
    "setting without a value": (lambda w: compress(w, "-s", "group_size"), "group_size.*KEY=VALUE"),
    "bits of a method without bits": (
        lambda w: compress(w, "-m", "lillama", "--bits", 3),
        "lillama .*'bits'.* reduction",
    ),
    "bits out of range": (lambda w: compress(w, "--bits", 17), "num_bits.*17.*1 to 8"),
    "cluscomp: unreachable budget": (
        lambda w: compress(w, "-m", "cluscomp", "--bits", 0.2),
        r"bits=0\.2.* \d\.\d+ bits",
    ),
    "svd: unreachable budget": (
        lambda w: compress(w, "-m", "svd", "--bits", 0.01),
        r"bits=0\.01.* 0\.7500 bits .*k_proj .*\[32, 64\]",
    ),
    "magnitude: unreachable budget": (
        lambda w: compress(w, "-m", "magnitude", "--bits", 0.001),
        r"bits=0\.001.* \d\.\d+ bits",
    ),
    "delta_come: unreachable budget": (
        lambda w: compress(w, "-m", "delta_come", "--bits", 0.01),
        r"bits=0\.01.* \d\.\d+ bits",
    ),
    "lillama: unreachable reduction": (
        lambda w: compress(
            w, "-m", "lillama", "-s", "reduction=0.99", "--calibration", w.calibration
        ),
        r"reduction=0\.99.* 0\.\d+",
    ),
    "calibration is needed": (
        lambda w: compress(w, "-m", "gptq", "--bits", 4),
        "gptq .*--text.* --calibration",
    ),
    "text and calibration": (
        lambda w: compress(w, "--text", w.folder / "x", "--calibration", w.calibration),
        "--text.* --calibration",
    ),
    "statistics of another model": (foreign_calibration, "tiny-calibration"),
    "damaged statistics": (damaged_calibration, r"moments-\d+\.safetensors"),
    "a calibration that is none": (
        lambda w: compress(w, "-m", "gptq", "--bits", 4, "--calibration", w.packed),
        "tiny-rtn.* `llmpress calibrate`",
    ),
    "missing text": (
        lambda w: compress(w, "--text", w.folder / "nowhere.txt"),
        r"nowhere\.txt",
    ),
    "text that is none": (lambda w: calibrated(w, b"\xff\xfe\x00"), r"text\.txt.* UTF-8"),
    "empty text": (lambda w: calibrated(w, b" \n"), r"text\.txt"),
    "too little text": (
        lambda w: calibrated(w, b"def f(): pass\n" * 50),
        r"16 windows of 512 tokens.* \d+",
    ),
    "no such model": (
        lambda w: compress(w, model=w.folder / "nowhere"),
        "nowhere",
    ),
    "hub name without a revision": (
        lambda w: llmpress("compress", "owner/name", "-m", "rtn", "-o", w.out),
        "owner/name@main",
    ),
    "a folder without a model": (
        lambda w: compress(w, model=w.folder),
        r"config\.json",
    ),
    "encoder": (
        other_architecture(BertConfig(architectures=["BertForMaskedLM"])),
        "BertForMaskedLM",
    ),
    "encoder-decoder": (other_architecture(T5Config()), "copy.*[Tt]5"),
    "unknown architecture": (unknown_architecture, "copy.* code"),
    "damaged configuration": (damaged_config, r"config\.json.* JSON"),
    "NaN weight": (poison(float("nan")), r"model\.layers\.1\.mlp\.up_proj"),
    "Inf weight": (poison(float("inf")), r"model\.layers\.1\.mlp\.up_proj"),
    "truncated safetensors": (truncated, r"model\.safetensors"),
    "corrupted safetensors": (corrupted_header, r"model\.safetensors"),
    "corrupted artifact": (corrupted_artifact, r"model\.safetensors"),
    "tensor of another shape": (wrong_shape, r"up_proj\.weight.*\[175, 64\].*\[176, 64\]"),
    "missing tensor when opened": (
        lambda w: llmpress("generate", without_a_tensor(w), "x"),
        r"'model\.layers\.1\.mlp\.up_proj\.weight'",
    ),
    "missing tensor": (
        lambda w: compress(w, model=without_a_tensor(w)),
        r"model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "pickled weights": (pickle_only, "copy.* pickle"),
    "no tokenizer": (no_tokenizer, "copy.* tokenizer"),
    "compressed twice": (lambda w: compress(w, model=w.packed), "tiny-rtn"),
    "a delta instead of a model": (
        lambda w: llmpress("generate", w.small_delta, "x"),
        "tiny-compressed-delta.* --delta",
    ),
    "a delta that is not compressed": (
        lambda w: llmpress("generate", w.model, "x", "--delta", w.delta),
        "tiny-delta.* compressed_delta",
    ),
    "a model instead of a delta": (
        lambda w: llmpress("delta", "compress", w.model, "-m", "svd", "--bits", 1, "-o", w.out),
        r"delta\.json",
    ),
    "delta of another base": (
        lambda w: llmpress("delta", "apply", w.finetuned, w.small_delta, "-o", w.out),
        "tiny-finetuned",
    ),
    "base and fine-tuned of other shapes": (
        other_shapes,
        r"up_proj\.weight.*\[175, 64\].*\[176, 64\]",
    ),
    "fine-tuned with fewer tensors": (fewer_tensors, r"'model\.norm\.weight'"),
    "prompt longer than the context": (
        lambda w: llmpress("generate", w.model, "x = 1\n" * 600),
        r"\d+ tokens.* 128 .*512",
    ),
    "too many new tokens": (
        lambda w: llmpress("generate", w.model, "x", "--max-tokens", 512),
        "512.* --max-tokens",
    ),
    "no prompt": (lambda w: llmpress("generate", w.model, ""), "prompt"),
    "chat without a template": (
        lambda w: llmpress("generate", w.model, "x", "--chat"),
        "--chat",
    ),
    "GPU asked for and absent": (
        lambda w: compress(w, "--device", "cuda:99"),
        "'cuda:99'",
    ),
    "no such device": (lambda w: compress(w, "--device", "abacus"), "'abacus'"),
    "unknown dtype": (
        lambda w: llmpress("generate", w.model, "x", "--dtype", "int3"),
        "int3.* float32, bfloat16 or float16",
    ),
    "compare with a delta and no base": (
        lambda w: llmpress("compare", w.model, w.small_delta, "--text", text_file(w, b"x" * 99)),
        "tiny-compressed-delta.* --base",
    ),
    "finetune what holds no floats": (
        lambda w: finetune(w),
        "quantized",
    ),
    "finetune what is not compressed": (
        lambda w: finetune(w, start=w.model),
        "tiny-model",
    ),
    "finetune against another model": (
        lambda w: finetune(w, "--original", w.finetuned),
        "tiny-finetuned",
    ),
    "finetune without an original": (
        lambda w: llmpress(
            "finetune", w.packed, "--items", w.folder, "--steps", 1, "--lr", 1, "-o", w.out
        ),
        "--original",
    ),
    "finetune on nothing": (
        lambda w: llmpress(
            "finetune", w.packed, "--original", w.model, "--steps", 1, "--lr", 1, "-o", w.out
        ),
        "--text.* --items",
    ),
    "finetune what": (
        lambda w: finetune(w, "--trains", "everything"),
        "'everything'.* compressed, delta, lora, qlora",
    ),
    "finetune by unknown settings": (
        lambda w: finetune(w, "-s", "rnk=3"),
        "'rnk'.* 'rank'",
    ),
    "finetune by an option as a setting": (
        lambda w: finetune(w, "-s", "out=x"),
        "--set out",
    ),
    "finetune at no rate": (
        lambda w: finetune(w, "--lr", 0),
        "learning_rate.* 0",
    ),
    "finetune on too few items": (
        lambda w: finetune(w, "-s", "held_out=2"),
        "2 .*`held_out`",
    ),
    "finetune on items without answers": (
        finetune_unknown_items,
        "`query` and `target`",
    ),
    "inspect nothing": (
        lambda w: llmpress("inspect", w.folder),
        r"config\.json.* delta\.json",
    ),
    "push what is no artifact": (
        lambda w: llmpress("hub", "push", w.model, "owner/name"),
        r"provenance\.json",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(case: str, world: World) -> None:
    run, message = CASES[case]
    done = run(world)
    assert re.search(message, done.error), done.error
    left = {path.name for path in world.folder.iterdir()}
    assert left <= {"copy", "text.txt"}, left


@pytest.mark.parametrize("case", ["params", "method", "run"])
def test_a_mistake_in_params(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    params = {
        "params": ("runs: [", "params.yaml"),
        "method": ("seed: 0\nruns: {a: {model: m, methd: rtn}}", "'methd'.* 'method'"),
        "run": ((ROOT / "params.yaml").read_text(), "'rtn-3bi'.* 'rtn-3bit'"),
    }
    content, message = params[case]
    Path("params.yaml").write_text(content)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    key = {"method": "a", "run": "rtn-3bi"}.get(case, "x")
    done = llmpress("plan", key)
    assert re.search(message, done.error), done.error


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


COMMANDS: dict[str, Callable[[World, Path], Done]] = {
    "compress": lambda w, out: llmpress(
        "compress", w.model, "-m", "rtn", "--bits", 4, "-s", "group_size=16", "-o", out
    ),
    "extract": lambda w, out: llmpress("delta", "extract", w.model, w.finetuned, "-o", out),
    "export": lambda w, out: llmpress("export", w.packed, "--dense", "-o", out),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_grow_too_large(command: str, world: World) -> None:
    with file_size_limit(50_000):
        done = COMMANDS[command](world, world.out)
    assert "ulimit -f" in done.error
    assert not [path for path in world.folder.iterdir() if "unfinished" not in path.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(command: str, world: World) -> None:
    disk = world.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = COMMANDS[command](world, disk / "out")
        assert str(disk) in done.error
        assert not (disk / "out").exists()
        assert not [path for path in disk.iterdir() if path.name.startswith(".out-")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """A folder that its user may read and not write; root has to become somebody else for that."""
    folder.mkdir(mode=0o555)
    root = os.geteuid() == 0
    for parent in folder.parents:
        if root and parent.stat().st_uid == 0 and str(parent).startswith("/tmp/"):
            parent.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission_to_write(world: World) -> None:
    with without_permission(world.folder / "locked"):
        done = COMMANDS["compress"](world, world.folder / "locked/out")
    assert "locked" in done.error


def test_a_file_where_a_folder_is_needed(world: World) -> None:
    (world.folder / "file").write_text("")
    done = COMMANDS["compress"](world, world.folder / "file/out")
    assert str(world.folder / "file") in done.error


def test_from_pretrained_refuses_what_the_command_refuses(world: World) -> None:
    packed = world.copy(world.packed)
    edit_json(packed / "config.json", rope_theta=1.0)
    with pytest.raises(Exception, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(packed)
