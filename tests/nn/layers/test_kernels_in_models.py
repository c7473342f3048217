"""Models compute through the kernels without being told, and give what they give without them."""

from pathlib import Path

import pytest
import torch
from tiny_artifacts import Make
from torch import Tensor

from llmpress.deltas.applying import load_delta
from llmpress.deltas.compression import compress_delta
from llmpress.methods.delta_come import DeltaCoMe
from llmpress.models.loading import load_model
from llmpress.nn.kernels import dispatch
from llmpress.nn.kernels.dispatch import use_backend
from llmpress.nn.layers import CompressedLinear
from llmpress.nn.layers.mixed_low_rank import MixedLowRankLinear
from llmpress.serving.bank import DeltaBank
from llmpress.training.trainables import compressed_parameters, training

pytest.importorskip("triton")
PLACE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels run: on a GPU where there is one, else in Triton's interpreter."""
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.mark.parametrize("traced", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["rtn", "cluscomp", "svd", "bitdelta"])
def test_packed_models_compute_through_kernels(
    method: str,
    traced: bool,
    compressed: Make,
    tiny_windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(compressed(method), device=PLACE)
    tokens = tiny_windows[:2, :3].to(PLACE)
    with torch.no_grad():
        with use_backend("reference"):
            expected = model(tokens, use_cache=False).logits
        monkeypatch.setattr(CompressedLinear, "unpacked", None)  # nothing dense is rebuilt
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if traced else model
        with use_backend("triton"):
            found = call(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_codebooks_are_finetuned_through_kernels(compressed: Make, tiny_windows: Tensor) -> None:
    tokens, gradients = tiny_windows[:1, :4].to(PLACE), []
    for backend in ("reference", "triton"):
        model = load_model(compressed("cluscomp"), device=PLACE)
        parameters = compressed_parameters(model, norms=False)
        with use_backend(backend), training(model, parameters):
            model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in parameters.items()})
    for name, gradient in gradients[0].items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-3 * size)


def delta_of(delta: Path, bits: float, tmp_path: Path) -> Path:
    folder = tmp_path / str(bits)
    compress_delta(
        delta,
        method=DeltaCoMe(bits=bits, group_size=16, allocation="matrix"),
        seed=0,
        device=torch.device("cpu"),
        scratch=tmp_path / "scratch",
        out=folder,
    )
    return folder


def test_one_delta_for_all_rows_stays_packed(
    tiny_model_folder: Path,
    tiny_delta: Path,
    tiny_windows: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_delta(
        load_model(tiny_model_folder, device=PLACE), delta_of(tiny_delta, 2.0, tmp_path)
    )
    tokens = tiny_windows[:3, :2].to(PLACE)
    with torch.no_grad():
        with use_backend("reference"):
            expected = [model(tokens[:rows]).logits for rows in (1, 3, 1)]
        monkeypatch.setattr(CompressedLinear, "unpacked", None)
        with use_backend("triton"):
            found = [model(tokens[:rows]).logits for rows in (1, 3, 1)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_delta_that_has_moved_is_found_again(
    tiny_model_folder: Path, tiny_delta: Path, tmp_path: Path
) -> None:
    model = load_delta(
        load_model(tiny_model_folder, device=PLACE), delta_of(tiny_delta, 2.0, tmp_path)
    )
    delta = next(m for m in model.modules() if isinstance(m, MixedLowRankLinear))
    x, y = (torch.randn(2, n, device=PLACE) for n in (delta.in_features, delta.out_features))
    with torch.no_grad(), use_backend("triton"):
        delta.added_to(y, x)
        delta.load_state_dict(
            {name: t.clone() for name, t in delta.state_dict().items()}, assign=True
        )
        delta.scale.data = 2 * delta.scale.data
        torch.testing.assert_close(delta.added_to(y, x), y + delta(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_rows_of_several_tenants_go_through_one_kernel(
    tiny_model_folder: Path, tiny_delta: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    folders = [delta_of(tiny_delta, bits, tmp_path) for bits in (4.0, 2.0)]
    tokens = tiny_windows[:3, :2].to(PLACE)
    with DeltaBank(load_model(tiny_model_folder, device=PLACE)) as bank, torch.no_grad():
        for folder in folders:
            bank.add(folder.name, folder)
        plain = bank.model(tokens).logits
        bank.use([folders[1].name, None, folders[0].name])
        with use_backend("reference"):
            expected = bank.model(tokens).logits
        with use_backend("triton"):
            found = bank.model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], plain[1])
    assert float((found - plain)[[0, 2]].abs().max()) > 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_in_triton() -> None:
    assert not dispatch.uses_triton(torch.zeros(1))
    with use_backend("triton"):
        assert dispatch.uses_triton(torch.zeros(1))
        with use_backend("reference"):
            assert not dispatch.uses_triton(torch.zeros(1))
    assert not dispatch.uses_triton(torch.zeros(1))
