"""Not installed, nothing opens what llmpress made: transformers fails where it would only warn."""

import fnmatch
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_artifacts import Make
from tiny_models import build_architecture, built_once, library_text
from transformers import AutoModel, AutoModelForCausalLM

import llmpress
from llmpress.core.artifacts import read_json, write_json
from llmpress.methods.base import Method, Sensitivity, Shape
from llmpress.methods.rtn.method import RTN
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.planning.shapes import model_bytes, read_shapes

HEADS = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification")
OTHER = os.environ.get("LLMPRESS_OTHER_TRANSFORMERS", "")
"""A folder with another version of transformers, such as ``pip install --target`` makes."""
MIXTURES = ("mixtral", "qwen3_moe")
SETTINGS = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 2}


@dataclass(frozen=True)
class Only(RTN):
    """Rounding of the layers whose names match; the others stay dense."""

    pattern: str = "*.experts.*"

    def plan(
        self,
        shapes: dict[str, Shape],  # type: ignore[override]
        model_weights: int,
        sensitivity: dict[str, Sensitivity] | None = None,  # type: ignore[override]
    ) -> dict[str, Method | None]:
        """Take the layers that match."""
        plan = super().plan(shapes, model_weights, sensitivity)
        return {n: own if fnmatch.fnmatch(n, self.pattern) else None for n, own in plan.items()}


EXPERTS = {  # which matrices of a mixture are compressed
    "experts": "*.experts.*",
    "one matrix of each": "*.experts.*.gate_proj",
    "one expert": "*.experts.2.*",
    "one matrix": "*.1.mlp.experts.1.up_proj",
}


def compress_only(model: Path, pattern: str, out: Path) -> Path:
    method = Only(num_bits=4, group_size=16, pattern=pattern)
    return llmpress.compress_model(model, method=method, out=out, device="cpu")


def guards(folder: Path) -> list[str]:
    stored = load_file(folder / "model.safetensors")
    return [name for name, tensor in stored.items() if tensor.shape == (0,)]


@pytest.mark.parametrize("pattern", EXPERTS.values(), ids=EXPERTS)
@pytest.mark.parametrize("architecture", MIXTURES, indirect=True)
def test_the_guard_has_the_name_that_checkpoints_give_the_weight(
    architecture_folder: Path, tmp_path: Path, pattern: str
) -> None:
    packed = compress_only(architecture_folder, pattern, tmp_path / "packed")
    (guard,) = guards(packed)
    assert guard in load_file(architecture_folder / "model.safetensors")
    assert guard not in Checkpoint(packed).names()
    planned = model_bytes(read_shapes(architecture_folder), Only(4, 16, pattern))
    assert planned == (packed / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    model.save_pretrained(tmp_path / "again")
    assert guards(tmp_path / "again") == [guard]


Kinds = dict[str, Path]


@pytest.fixture
def kinds(
    compressed: Make,
    compressed_delta: Path,
    tiny_delta: Path,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    calibration: Path,
    shared_folder: Path,
    tmp_path: Path,
) -> Kinds:
    """A folder of every kind that llmpress makes and only llmpress is to open."""
    made = {"compressed": compressed("rtn"), "delta": tiny_delta, "small delta": compressed_delta}
    text = ["\n\n".join(library_text(("asyncio",)))]
    how: dict[str, Any] = {"text": text, "steps": 1, "learning_rate": 1e-3, "held_out": 2,
                           "batch_size": 2, "length": 32, "device": "cpu"}  # fmt: skip
    made["trained"] = llmpress.train_model(
        compressed("cluscomp"), original=tiny_model_folder, out=tmp_path / "trained", **how
    )
    made["trained delta"] = llmpress.train_model(
        compressed_delta, base=tiny_model_folder, original=tiny_finetuned_folder, trains="delta",
        out=tmp_path / "trained-delta", objective="distillation", **how,
    )  # fmt: skip
    made["finetuned"] = llmpress.finetune_model(
        compressed("cluscomp"), original=tiny_model_folder, calibration=calibration,
        out=tmp_path / "tuned", **SETTINGS,
    )  # fmt: skip
    for family in MIXTURES:
        source = built_once(
            shared_folder, f"tiny-{family}", partial(build_architecture, family, tiny_model_folder)
        )
        for name, pattern in EXPERTS.items():
            place = tmp_path / family / name
            made[f"{family}, {name}"] = compress_only(source, pattern, place)
    for name in ("compressed", *(f"{family}, experts" for family in MIXTURES)):
        model = AutoModelForCausalLM.from_pretrained(made[name], dtype="auto")
        made[f"{name} again"], made[f"{name} shards"] = tmp_path / f"{name}1", tmp_path / f"{name}2"
        model.save_pretrained(made[f"{name} again"])
        model.save_pretrained(made[f"{name} shards"], max_shard_size="50KB")
        base = AutoModel.from_pretrained(made[name], dtype="auto")
        made[f"{name} base"] = tmp_path / f"{name}3"
        base.save_pretrained(made[f"{name} base"])
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    "version",
    ["", pytest.param(OTHER, marks=pytest.mark.skipif(not OTHER, reason="no other version"))],
    ids=["this", "other"],
)
def test_without_llmpress_nothing_opens_it(kinds: Kinds, version: str) -> None:
    for config in (kinds[n] / "config.json" for n in kinds if n.startswith("qwen3_moe")):
        said = read_json(config)  # older versions know the number by one of its names only
        write_json(config, said | {"num_experts": said.get("num_local_experts", 8)})
    code = (
        "import sys; sys.modules['llmpress'] = None\n"
        "import transformers\n"
        f"for head in {HEADS}:\n"
        f"    for name, folder in {[(n, str(f)) for n, f in kinds.items()]}:\n"
        "        try: getattr(transformers, head).from_pretrained(folder)\n"
        "        except (RuntimeError, OSError, ValueError) as error: pass\n"
        "        else: print(head, name)\n"
        "print('all')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": version},
    )  # fmt: skip
    assert done.stdout == "all\n", done.stderr
    assert "got llmpress" in done.stderr
