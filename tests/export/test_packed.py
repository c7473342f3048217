"""compressed-tensors reads the very values of an artifact out of what is exported for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import nn

import llmpress
from llmpress.core.artifacts import read_json
from llmpress.core.errors import ArtifactError


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_values_are_the_same(
    bits: int, dtype: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    packed = llmpress.compress_model(
        tiny_model_folder, method="rtn", bits=bits, group_size=16, out=tmp_path / "packed"
    )
    llmpress.export_packed(packed, out=tmp_path / "out", dtype=dtype)
    tensors = load_file(tmp_path / "out/model.safetensors")
    said = read_json(tmp_path / "out/config.json")["quantization_config"]
    read = QuantizationConfig.model_validate(said)
    (scheme,) = read.config_groups.values()
    dense = llmpress.dequantized(llmpress.load_model(packed, dtype=torch.float32))
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name not in said["ignore"]:
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if name in k}
            weight = PackedQuantizationCompressor.decompress(own, scheme)["weight"].float()
            torch.testing.assert_close(weight, module.weight, rtol=1e-3, atol=1e-6)
            if dtype == "float32":
                torch.testing.assert_close(weight, module.weight, rtol=0, atol=0)
    plain = {name for name in tensors if "weight_" not in name}
    assert "model.norm.weight" in plain
    assert said["ignore"] == ["lm_head"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"method": "rtn", "bits": 3, "group_size": 16}, "has 3 bits"),
    "groups": ({"method": "rtn", "bits": 4, "group_size": 24}, "groups of 24"),
    "kind": ({"method": "svd", "keep": 0.5}, "low"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_refused_by_name(
    case: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    settings, named = REFUSED[case]
    packed = llmpress.compress_model(tiny_model_folder, **settings, out=tmp_path / "packed")
    with pytest.raises(ArtifactError, match=rf"model\.layers\.\S+ .*{named}"):
        llmpress.export_packed(packed, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_compressed_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=tiny_model_folder.name):
        llmpress.export_packed(tiny_model_folder, out=tmp_path / "out")
