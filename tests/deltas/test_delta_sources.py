"""Deltas of real checkpoints: mixed dtypes, grown vocabularies, shards, compressed bases."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import llmpress
from safetensors.torch import load_file, save_file
from tiny_artifacts import Make
from torch import Tensor

from llmpress.core.artifacts import fingerprint, read_json, write_json
from llmpress.core.errors import ArtifactError
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import DenseCheckpoint, dense_checkpoint
from llmpress.models.checkpoints.files import Checkpoint, CheckpointWriter
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.walk import BlockWalk

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LINEAR = "model.layers.1.mlp.up_proj"
NORM_BYTES = 4 * 7 * 64
CPU = torch.device("cpu")

Edit = Callable[[dict[str, Tensor]], None]


def varied(source: Path, out: Path, edit: Edit, **config: object) -> Path:
    """A copy of a model folder with other tensors and settings."""
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", read_json(source / "config.json") | config)
    for file in source.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def extracted(base: Path, finetuned: Path, out: Path) -> DeltaFolder:
    extract_delta(base, finetuned, out=out)
    return DeltaFolder(out, "delta")


def assert_same(found: Tensor, expected: Tensor, atol: float = 0) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def four_more_tokens(tensors: dict[str, Tensor]) -> None:
    grown = torch.cat([tensors[EMBEDDINGS], torch.ones(4, 64)])
    grown[7] += 1
    tensors[EMBEDDINGS] = grown


def test_added_tokens_cost_their_rows(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    tuned = varied(tiny_finetuned_folder, tmp_path / "tuned", four_more_tokens, vocab_size=516)
    delta = extracted(tiny_model_folder, tuned, tmp_path / "delta")
    assert delta.header["exact_rows"] == {EMBEDDINGS: {"shape": [516, 64], "rows": 5}}
    assert delta.header["exact"][EMBEDDINGS] == 5 * 64
    assert delta.tensor(f"exact_rows.{EMBEDDINGS}.index").tolist() == [7, 512, 513, 514, 515]
    assert delta.exact_bytes() == NORM_BYTES + 5 * (64 * 4 + 8)
    assert delta.exact_names() == sorted([*delta.header["exact"]])
    assert len(list(delta.exact_tensors())) == 7 + 2
    assert delta.exact_shape(EMBEDDINGS) == (516, 64)
    old = Checkpoint(tiny_model_folder).tensor(EMBEDDINGS)
    assert_same(delta.exact(EMBEDDINGS, old), Checkpoint(tuned).tensor(EMBEDDINGS))
    assert_same(delta.exact(NORM, None), Checkpoint(tuned).tensor(NORM))
    for other in (None, old[:, :-1], torch.zeros(517, 64)):
        with pytest.raises(ArtifactError, match=r"model\.embed_tokens\.weight"):
            delta.exact(EMBEDDINGS, other)
    delta.header["exact_rows"][EMBEDDINGS]["shape"] = [515, 64]
    with pytest.raises(ArtifactError, match=r"model\.embed_tokens\.weight"):
        delta.exact(EMBEDDINGS, old)


def test_rows_come_through_compression_and_application(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    tuned = varied(tiny_finetuned_folder, tmp_path / "tuned", four_more_tokens, vocab_size=516)
    delta = extracted(tiny_model_folder, tuned, tmp_path / "delta")
    small = compressed_by_svd(delta.folder, tmp_path / "small")
    assert read_json(small / "layers.json")["totals"]["exact_bytes"] == delta.exact_bytes()
    done = llmpress("delta", "apply", tiny_model_folder, small, "-o", tmp_path / "dense",
                    "--dtype", "float32")  # fmt: skip
    assert done.code == 0, done.err
    dense = Checkpoint(tmp_path / "dense")
    assert_same(dense.tensor(EMBEDDINGS), Checkpoint(tuned).tensor(EMBEDDINGS))
    assert dense.config.vocab_size == 516


@pytest.mark.parametrize(("rows", "is_sparse"), [(255, True), (256, False)])
def test_from_half_of_the_rows_on_a_matrix_is_kept_whole(
    rows: int, is_sparse: bool, tiny_model_folder: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDINGS][:rows, 3] += 1
        tensors[f"{LINEAR}.weight"] += 1

    tuned = varied(tiny_model_folder, tmp_path / "tuned", change)
    delta = extracted(tiny_model_folder, tuned, tmp_path / "delta")
    assert (EMBEDDINGS in delta.header["exact_rows"]) == is_sparse
    assert delta.exact_bytes() == (rows * (256 + 8) if is_sparse else 512 * 256)
    old, new = (Checkpoint(folder).tensor(EMBEDDINGS) for folder in (tiny_model_folder, tuned))
    assert_same(delta.exact(EMBEDDINGS, old), new)


def halved(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def edited(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.weight"] *= 1.5
    tensors[EMBEDDINGS][9] += 1
    tensors[NORM] += 1


def test_a_rounded_copy_is_no_change(tiny_model_folder: Path, tmp_path: Path) -> None:
    def tuned_edit(tensors: dict[str, Tensor]) -> None:
        edited(tensors)
        halved(tensors)

    base = tiny_model_folder
    tuned = varied(base, tmp_path / "tuned", tuned_edit)
    delta = extracted(base, tuned, tmp_path / "delta")
    assert list(delta.header["linears"]) == [LINEAR]
    assert delta.header["exact"] == {EMBEDDINGS: 64, NORM: 64}
    assert delta.tensor(f"exact_rows.{EMBEDDINGS}.index").tolist() == [9]
    found = delta.exact(EMBEDDINGS, Checkpoint(base).tensor(EMBEDDINGS))
    new = Checkpoint(tuned).tensor(EMBEDDINGS)
    assert found.dtype == new.dtype
    assert_same(found[9], new[9])
    assert_same(found.bfloat16(), new.bfloat16())


def test_the_same_dtype_is_compared_exactly(tiny_model_folder: Path, tmp_path: Path) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        weight = tensors[f"{LINEAR}.weight"]
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))

    tuned = varied(tiny_model_folder, tmp_path / "tuned", nudge)
    delta = extracted(tiny_model_folder, tuned, tmp_path / "delta")
    assert list(delta.header["linears"]) == [LINEAR]


def test_shards_of_the_two_models_need_not_agree(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    source = Checkpoint(tiny_model_folder)
    writer = CheckpointWriter(sharded, max_shard_bytes=100_000)
    for name in reversed(source.names()):
        writer.add(name, source.tensor(name))
    writer.close()
    shutil.copy(tiny_model_folder / "config.json", sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    cut = extracted(sharded, tiny_finetuned_folder, tmp_path / "cut")
    whole = extracted(tiny_model_folder, tiny_finetuned_folder, tmp_path / "whole")
    assert cut.names() == whole.names()
    for name in whole.names():
        assert_same(cut.tensor(name), whole.tensor(name))


def test_an_untied_head_and_layers_of_its_own_are_kept_exactly(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDINGS] * 0.9
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2", "layers.3")] = tensors[name] * 0.9

    more = {"tie_word_embeddings": False, "num_hidden_layers": 4}
    tuned = varied(tiny_finetuned_folder, tmp_path / "tuned", add, **more)
    delta = extracted(tiny_model_folder, tuned, tmp_path / "delta")
    new = Checkpoint(tuned)
    own = [name for name in new.names() if name.startswith("model.layers.3.")]
    assert len(own) == 9
    for name in [HEAD, *own]:
        assert_same(delta.exact(name, None), new.tensor(name))
    assert not any(name.startswith("model.layers.3.") for name in delta.header["linears"])
    view = FinetunedCheckpoint(Checkpoint(tiny_model_folder), delta)
    assert view.names() == new.names()
    assert view.config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ["rtn", "cluscomp"])
def test_a_compressed_base_stands_for_its_dense_weights(
    name: str,
    compressed: Make,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    tmp_path: Path,
) -> None:
    base, new = compressed(name), Checkpoint(tiny_finetuned_folder)
    dense = dense_checkpoint(base)
    assert isinstance(dense, DenseCheckpoint)
    assert dense.names() == Checkpoint(tiny_model_folder).names()
    assert [dense.shape(n) for n in dense.names()] == [new.shape(n) for n in dense.names()]
    delta = extracted(base, tiny_finetuned_folder, tmp_path / "delta")
    assert delta.header["base"]["fingerprint"] == fingerprint(base)
    assert delta.header["unchanged"] == [EMBEDDINGS]  # stored in bf16, fp32 in the other
    view = FinetunedCheckpoint(dense, delta)
    for linear in delta.header["linears"]:
        weight = new.tensor(f"{linear}.weight")
        assert_same(view.tensor(f"{linear}.weight"), weight, atol=1e-6)
    small = compressed_by_svd(delta.folder, tmp_path / "small")
    done = llmpress("delta", "apply", base, small, "-o", tmp_path / "dense",
                    "--dtype", "float32")  # fmt: skip
    assert done.code == 0, done.err
    assert "quantization_config" not in read_json(tmp_path / "dense/config.json")
    found = Checkpoint(tmp_path / "dense")
    errors = {row["name"]: row for row in read_json(small / "layers.json")["layers"]}
    for linear in delta.header["linears"]:
        difference = found.tensor(f"{linear}.weight") - new.tensor(f"{linear}.weight")
        squared = float(difference.square().sum() / delta.tensor(f"{linear}.weight").square().sum())
        assert squared == pytest.approx(errors[linear]["relative_weight_error"], rel=1e-2)
    for exact in delta.exact_names():
        assert_same(found.tensor(exact), new.tensor(exact))


def compressed_by_svd(delta: Path, out: Path) -> Path:
    compress_delta(
        delta,
        method=build_method("svd", {"rank": 8}, "svd"),
        seed=0,
        device=CPU,
        scratch=out.with_name("scratch"),
        out=out,
    )
    return out


def test_base_and_delta_are_walked_as_the_finetuned_model(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path, tiny_windows: Tensor
) -> None:
    tuned = varied(tiny_finetuned_folder, tmp_path / "tuned", four_more_tokens, vocab_size=516)
    delta = extracted(tiny_model_folder, tuned, tmp_path / "delta")
    new, view = Checkpoint(tuned), FinetunedCheckpoint(Checkpoint(tiny_model_folder), delta)
    assert view.fingerprint == new.fingerprint
    assert view.names() == new.names()
    assert [view.shape(name) for name in view.names()] == [new.shape(name) for name in new.names()]
    assert view.plain_config() == new.plain_config()
    windows = torch.cat([tiny_windows[:2], torch.full((2, 4), 515)], dim=1)
    states = []
    for checkpoint in (new, view):
        walk = BlockWalk(checkpoint.skeleton(), checkpoint, device=CPU)
        hidden = walk.embed(windows)
        for index in range(len(walk)):
            hidden = walk.propagate(walk.load(index), index, hidden)
        states.append(hidden)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


def test_another_base_of_a_delta_is_refused(tiny_finetuned_folder: Path, tiny_delta: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tiny-model"):
        FinetunedCheckpoint(Checkpoint(tiny_finetuned_folder), DeltaFolder(tiny_delta, "delta"))


def test_deltas_of_the_first_version_are_refused(tiny_delta: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_delta, tmp_path / "old")
    header = read_json(tmp_path / "old/delta.json")
    write_json(tmp_path / "old/delta.json", {**header, "format_version": 1})
    with pytest.raises(ArtifactError, match=r"version 1"):
        DeltaFolder(tmp_path / "old", "delta")


def test_small_steps_in_fp32_count_on_a_bf16_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16()

    def nudge(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.bfloat16().float() * (1 + 1e-5)

    half = varied(tiny_model_folder, tmp_path / "half", halve)
    nudged = varied(tiny_model_folder, tmp_path / "nudged", nudge)
    delta = extracted(half, nudged, tmp_path / "delta")
    assert len(delta.header["linears"]) == 21
    assert len(delta.exact_names()) == 1 + 3 * 2 + 1
