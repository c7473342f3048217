"""Block-wise finetuning: it helps on held-out text, stays inside a block, resumes bit for bit."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmpress.compression.layers import compress_layers, model_shapes
from llmpress.compression.writing import write_compressed_model
from llmpress.core.errors import NumericalError
from llmpress.core.records import BlockRecord
from llmpress.core.resume import BlockStore
from llmpress.methods.cluscomp import ClusComp
from llmpress.methods.lillama import Lillama
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import skeleton
from llmpress.models.walk import BlockWalk
from llmpress.tuning.blocks import tune_blocks
from llmpress.tuning.settings import TuningSettings

CPU = torch.device("cpu")
METHODS = {
    "cluscomp": (ClusComp(num_entries=24, vector_size=4), 0.03),
    "lillama": (Lillama(reduction=0.25, start="weights"), 0.003),
}


class Case:
    """A compressed tiny model beside its original."""

    def __init__(self, name: str, source: Path, root: Path) -> None:
        self.method, self.rate = METHODS[name]
        self.original = Checkpoint(source)
        self.root = root
        folder = root / name
        folder.mkdir()
        empty = skeleton(self.original)
        layers = compress_layers(
            model_shapes(empty),
            self.original,
            self.method,
            None,
            model_weights=empty.num_parameters(),
            seed=0,
            device=CPU,
            store=BlockStore("compress", {}, root / "scratch"),
        )
        write_compressed_model(self.original, layers, empty.num_parameters(), folder)
        self.compressed = Checkpoint(folder)

    def tune(
        self, windows: Tensor, *, store: str = "a", epochs: int = 2, rate: float | None = None
    ) -> Iterator[tuple[dict[str, Tensor], BlockRecord]]:
        teacher, student = (
            BlockWalk(skeleton(c), c, device=CPU) for c in (self.original, self.compressed)
        )
        return tune_blocks(
            teacher,
            student,
            self.method,
            windows[:12],
            windows[12:],
            TuningSettings(epochs=epochs, learning_rate=rate or self.rate),
            seed=0,
            store=BlockStore(f"tune-{store}", {}, self.root / "scratch"),
        )


@pytest.fixture(params=list(METHODS))
def case(request: pytest.FixtureRequest, tiny_model_folder: Path, tmp_path: Path) -> Case:
    return Case(request.param, tiny_model_folder, tmp_path)


def test_every_block_gets_better_on_held_out_windows(case: Case, tiny_windows: Tensor) -> None:
    records = [record for _, record in case.tune(tiny_windows, epochs=4)]
    assert [r.index for r in records] == [0, 1, 2]
    for record in records:
        assert record.kept
        assert record.loss_after == min(record.validation_loss)
    before, after = (sum(getattr(r, f"loss_{x}") for r in records) for x in ("before", "after"))
    assert after < 0.98 * before


def test_only_trainable_tensors_change_and_keep_their_dtype(
    case: Case, tiny_windows: Tensor
) -> None:
    for tensors, record in case.tune(tiny_windows, epochs=1):
        for name, tensor in tensors.items():
            before = case.compressed.tensor(name)
            assert name.startswith(f"model.layers.{record.index}.")
            assert tensor.dtype == before.dtype
            assert tensor.shape == before.shape
            assert bool((tensor != before).any())


def test_the_second_chain_sees_errors_of_earlier_blocks(case: Case, tiny_windows: Tensor) -> None:
    tuned = {}
    for tensors, _ in case.tune(tiny_windows):
        tuned.update(tensors)
    teacher, student = (
        BlockWalk(skeleton(c), c, device=CPU) for c in (case.original, case.compressed)
    )
    target, start, finetuned = (w.embed(tiny_windows[12:]) for w in (teacher, student, student))
    for index in range(len(teacher)):
        target = teacher.propagate(teacher.load(index), index, target)
        start = student.propagate(student.load(index), index, start)
        block = student.load(index)
        prefix = f"model.layers.{index}."
        own = {n.removeprefix(prefix): t for n, t in tuned.items() if n.startswith(prefix)}
        block.load_state_dict(own, strict=False)
        finetuned = student.propagate(block, index, finetuned)
    assert (finetuned - target).norm() < 0.9 * (start - target).norm()


def test_a_killed_run_continues_with_the_same_bytes(case: Case, tiny_windows: Tensor) -> None:
    whole = list(case.tune(tiny_windows, store="whole"))
    interrupted = case.tune(tiny_windows, store="killed")
    next(interrupted)
    next(interrupted)
    interrupted.close()
    resumed = list(case.tune(tiny_windows, store="killed"))
    for (expected, first), (tensors, second) in zip(whole, resumed, strict=True):
        assert expected.keys() == tensors.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
        assert {**asdict(first), "seconds": 0} == {**asdict(second), "seconds": 0}


def test_a_block_that_does_not_get_better_keeps_its_start(case: Case, tiny_windows: Tensor) -> None:
    for tensors, record in case.tune(tiny_windows, epochs=1, rate=50.0):
        assert not record.kept
        assert record.loss_after == record.loss_before < record.validation_loss[0]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, case.compressed.tensor(name), rtol=0, atol=0)


def test_a_loss_that_is_not_finite_names_the_block(case: Case, tiny_windows: Tensor) -> None:
    with pytest.raises(NumericalError, match=r"model\.layers\.0: "):
        list(case.tune(tiny_windows, epochs=4, rate=1e30))


def test_gradients_do_not_reach_another_block(
    case: Case, tiny_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BlockWalk.forward
    entered: list[tuple[int, bool]] = []
    trained: dict[int, list[torch.nn.Parameter]] = {}

    def spy(walk: BlockWalk, block: torch.nn.Module, index: int, hidden_states: Tensor) -> Tensor:
        entered.append((index, hidden_states.requires_grad))
        if any(parameter.requires_grad for parameter in block.parameters()):
            trained[index] = list(block.parameters())
            for earlier in range(index):
                assert all(parameter.grad is None for parameter in trained[earlier])
        return run(walk, block, index, hidden_states)

    monkeypatch.setattr(BlockWalk, "forward", spy)
    list(case.tune(tiny_windows))
    assert sorted(trained) == [0, 1, 2]
    assert {index for index, _ in entered} == {0, 1, 2}
    assert not any(has_graph for _, has_graph in entered)


def test_blocks_above_the_last_compressed_one_are_not_loaded(
    tiny_model_folder: Path, tiny_windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        METHODS,
        "bottom",
        (Lillama(reduction=0.1, start="weights", strategy="bottom"), 0.003),
    )
    case = Case("bottom", tiny_model_folder, tmp_path)
    entries = case.compressed.config.quantization_config["layers"]
    top = max(int(name.split(".")[2]) for name in entries)
    assert top < 2
    load, loaded = BlockWalk.load, []

    def spy(walk: BlockWalk, index: int) -> torch.nn.Module:
        loaded.append(index)
        return load(walk, index)

    monkeypatch.setattr(BlockWalk, "load", spy)
    records = [record for _, record in case.tune(tiny_windows)]
    assert [record.index for record in records] == sorted(set(loaded)) == list(range(top + 1))
