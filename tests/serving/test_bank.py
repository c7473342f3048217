"""Deltas side by side on one base give what each gives alone."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tenants import Deltas, tenant
from tiny_models import architecture_config, tokenize
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import llmpress
from llmpress import DeltaBank
from llmpress.core.errors import ArtifactError
from llmpress.nn.layers import AdaptedLinear, CompressedLinear
from llmpress.serving.rows import PerRow

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def bank(tiny_model_folder: Path, deltas: Deltas) -> DeltaBank:
    filled = DeltaBank(llmpress.load_model(tiny_model_folder))
    for name, folder in deltas.items():
        filled.add(name, folder)
    return filled


@torch.no_grad()
def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    output: Tensor = model(windows).logits
    return output


def random_model(architecture: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(architecture_config(architecture)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def test_one_call_loads_base_and_delta(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, deltas: Deltas, tiny_windows: Tensor
) -> None:
    model = llmpress.load_finetuned(str(tiny_model_folder), str(deltas["grown"]))
    expected = llmpress.load_delta(llmpress.load_model(tiny_model_folder), deltas["grown"])
    found, target = (logits(m, tiny_windows[:2]) for m in (model, expected))
    torch.testing.assert_close(found, target, rtol=0, atol=0)
    half = llmpress.load_finetuned(tiny_model_folder, deltas["tuned"], dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with pytest.raises(ArtifactError, match=r"tiny-model .*tiny-finetuned"):
        llmpress.load_finetuned(tiny_finetuned_folder, deltas["tuned"])


def test_what_rows_need_is_built_once_for_all_assignments(
    deltas: Deltas, bank: DeltaBank, tiny_windows: Tensor
) -> None:
    windows = tiny_windows[:2]
    one, other = ["tuned", None], ["biased", "tuned"]

    def used(rows: list[str | None]) -> tuple[Tensor, dict[str, int]]:
        bank.use(rows)
        modules = {n: id(m) for n, m in bank.model.named_modules() if isinstance(m, PerRow)}
        return logits(bank.model, windows), modules

    first, modules = used(one)
    second, others = used(other)
    assert modules
    assert modules == others
    bank.use("grown")
    for rows, expected in ((one, first), (other, second)):
        found, again = used(rows)
        assert again == modules
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    bank.use(None)
    bank.remove("tuned")
    bank.add("tuned", deltas["biased"])
    torch.testing.assert_close(used(one)[0][0], second[0], **TOLERANCE)


def test_tokens_of_a_packed_batch_have_deltas_of_their_own(
    bank: DeltaBank, tiny_windows: Tensor
) -> None:
    names = ["grown", None, "tuned", "biased", "untied"]
    x = bank.model.get_input_embeddings()(tiny_windows[: len(names), :3])
    head, layer = bank.model.lm_head, "model.layers.0.self_attn.q_proj"

    def outputs(x: Tensor) -> list[Tensor]:
        return [bank.model.get_submodule(layer)(x), bank.model.lm_head(x[:, :1])]

    bank.use(names)
    expected, logits_ = outputs(x)
    tokens = [name for name in names for _ in range(3)]
    bank.use_packed(tokens, names)
    found = bank.model.get_submodule(layer)(x.flatten(0, 1)[None])
    torch.testing.assert_close(found, expected.flatten(0, 1)[None], **TOLERANCE)
    packed = bank.model.lm_head(x[:, 0][None])
    torch.testing.assert_close(packed, logits_[:, 0][None], **TOLERANCE)
    bank.use_packed(names, names[::-1])  # as many tokens, and the head's in another order
    torch.testing.assert_close(bank.model.lm_head(x[:, 0].flip(0)[None]), packed.flip(1))
    with pytest.raises(ValueError, match=r"5 rows.* 15"):
        bank.model.get_submodule(layer)(x.flatten(0, 1)[None])
    bank.use(None)
    assert bank.model.lm_head is head


def test_rows_of_a_mixed_batch_are_those_of_each_model_alone(
    tiny_model_folder: Path, deltas: Deltas, bank: DeltaBank, tiny_windows: Tensor
) -> None:
    names = ["grown", None, "tuned", "biased", "untied", "tuned"]
    windows = tiny_windows[: len(names)].clone()
    base = llmpress.load_model(tiny_model_folder)
    alone = logits(base, windows)
    windows[0, -1] = 513  # a token that the base does not have
    bank.use(names)
    found = logits(bank.model, windows)
    assert found.shape == (6, 64, 515)
    for row, name in enumerate(names):
        if name is None:
            torch.testing.assert_close(found[row, :, :512], alone[row], rtol=0, atol=0)
            expected = alone[row]
        else:
            with DeltaBank(base) as single:
                single.add(name, deltas[name])
                single.use(name)
                expected = logits(base, windows[row : row + 1])[0]
            loaded = llmpress.load_delta(copy.deepcopy(base), deltas[name])
            target = logits(loaded, windows[row : row + 1])[0]
            torch.testing.assert_close(expected, target, **TOLERANCE)  # by the sum of both
            assert float((expected[:, :512] - alone[row]).abs().mean()) > 0.01
        width = expected.shape[-1]
        assert width == (515 if name == "grown" else 512)
        torch.testing.assert_close(found[row, :, :width], expected, **TOLERANCE)
        assert (found[row, :, width:] == -torch.inf).all()


def test_a_batch_without_deltas_is_the_bases_bit_for_bit(
    bank: DeltaBank, tiny_windows: Tensor
) -> None:
    before = logits(bank.model, tiny_windows[:3])
    for rows in (None, [None] * 3):
        bank.use("grown")
        bank.use(["grown", "biased", None])
        bank.use(rows)
        torch.testing.assert_close(logits(bank.model, tiny_windows[:3]), before, rtol=0, atol=0)


@pytest.mark.parametrize("rows", ["grown", "untied", ["grown", "biased"]], ids=str)
def test_closing_gives_the_model_back(
    bank: DeltaBank, rows: str | list[str | None], tiny_windows: Tensor, tiny_model_folder: Path
) -> None:
    model = bank.model
    untouched = llmpress.load_model(tiny_model_folder)
    bank.use(None)
    before = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    with bank:
        bank.use(rows)
        assert dict(model.named_modules()).keys() != modules.keys()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == [n for n, _ in untouched.named_parameters(remove_duplicate=False)]
    assert all(tensor is before[name] for name, tensor in after.items())
    assert dict(model.named_modules()) == modules
    assert repr(model) == repr(untouched)
    assert model.config.to_dict() == untouched.config.to_dict()
    assert model.vocab_size == 512
    torch.testing.assert_close(
        logits(model, tiny_windows[:2]), logits(untouched, tiny_windows[:2]), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="closed"):
        bank.use(None)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2}], ids=str)
def test_generated_rows_are_those_of_each_model_alone(
    options: dict[str, int], deltas: Deltas, bank: DeltaBank, tiny_model_folder: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model_folder)
    prompt = tokenize(tokenizer, ["import asyncio\n\nclass Server"])[None]
    names = ["biased", None, "grown", "tuned"]
    if options == {"num_beams": 2}:
        names, options = names[:2], {**options, "num_return_sequences": 2}
    copies = options.get("num_return_sequences", 1)
    settings = {**options, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    bank.use(names)
    found = bank.model.generate(prompt.repeat(len(names), 1), **settings)
    bank.use(None)
    for row, name in enumerate(names):
        model = llmpress.load_model(tiny_model_folder)
        if name is not None:
            model = llmpress.load_delta(model, deltas[name])
        expected = model.generate(prompt, **settings)
        assert found[row * copies : (row + 1) * copies].tolist() == expected.tolist()


def test_changed_biases_of_a_linear_that_has_some(tmp_path: Path, tiny_windows: Tensor) -> None:
    base = random_model("qwen2", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(base)
    folder = tenant(base, tmp_path / "tenant")
    with DeltaBank(llmpress.load_model(base)) as bank:
        bank.add("a", folder)
        bank.use("a")
        expected = logits(bank.model, tiny_windows[:2])
        bank.use([None, "a"])
        found = logits(bank.model, tiny_windows[:2])
    torch.testing.assert_close(found[1], expected[1], **TOLERANCE)
    torch.testing.assert_close(found[0], logits(bank.model, tiny_windows[:2])[0], rtol=0, atol=0)


def test_rows_on_a_compressed_base(
    compressed: Callable[[str], Path],
    tiny_finetuned_folder: Path,
    tmp_path: Path,
    tiny_windows: Tensor,
) -> None:
    base = compressed("rtn")
    folder = tenant(base, tmp_path / "tenant", source=tiny_finetuned_folder)
    with DeltaBank(llmpress.load_model(base)) as bank:
        assert any(isinstance(module, CompressedLinear) for module in bank.model.modules())
        before = logits(bank.model, tiny_windows[:3])
        bank.add("a", folder)
        bank.use(["a", None, "a"])
        found = logits(bank.model, tiny_windows[:3])
    expected = logits(llmpress.load_finetuned(base, folder), tiny_windows[:3])
    torch.testing.assert_close(found[1], before[1], rtol=0, atol=0)
    torch.testing.assert_close(found[::2], expected[::2], **TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("mixtral", r"experts\.0\."),
        ("mamba", r"a: .*backbone\.layers\.0\.mixer"),
    ],
)
def test_rows_that_a_module_cannot_tell_apart_are_refused(
    architecture: str, message: str, tmp_path: Path, tiny_windows: Tensor
) -> None:
    base = random_model(architecture, tmp_path / "base")
    folder = tenant(base, tmp_path / "tenant")
    bank = DeltaBank(llmpress.load_model(base))
    before = logits(bank.model, tiny_windows[:2, :16])
    bank.add("a", folder)
    bank.use("a")
    with pytest.raises(ArtifactError, match=message):
        bank.use(["a", None])
    expected = logits(llmpress.load_finetuned(base, folder), tiny_windows[:2, :16])
    found = logits(bank.model, tiny_windows[:2, :16])
    torch.testing.assert_close(found, expected, **TOLERANCE)
    bank.use(None)
    torch.testing.assert_close(logits(bank.model, tiny_windows[:2, :16]), before, **TOLERANCE)


def test_other_numbers_of_rows_are_refused(bank: DeltaBank, tiny_windows: Tensor) -> None:
    bank.use(["tuned", "biased"])
    assert logits(bank.model, tiny_windows[:4]).shape[0] == 4
    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"2 rows.* {count}"):
            logits(bank.model, tiny_windows[:count])
    with pytest.raises(ValueError, match="rows"):
        bank.use([])


def test_a_weight_that_is_read_without_a_call_says_so(bank: DeltaBank) -> None:
    bank.use(["untied", None])
    with pytest.raises(TypeError, match="Linear"):
        _ = bank.model.lm_head.weight


def test_names(bank: DeltaBank, deltas: Deltas) -> None:
    assert bank.names() == list(deltas)
    with pytest.raises(ValueError, match="'tuned'"):
        bank.add("tuned", deltas["tuned"])
    bank.use(["tuned", "grown"])
    for call in (bank.use, bank.remove, bank.nbytes, lambda name: bank.use([name, None])):
        with pytest.raises(ValueError, match=r"'grwn' .*'grown'"):
            call("grwn")
    with pytest.raises(ValueError, match="'grown'"):
        bank.remove("grown")
    bank.remove("biased")
    assert bank.names() == ["tuned", "grown", "untied"]


def test_a_bank_holds_what_it_read(
    tiny_model_folder: Path, deltas: Deltas, tmp_path: Path, tiny_windows: Tensor
) -> None:
    folder = shutil.copytree(deltas["tuned"], tmp_path / "delta")
    bank = DeltaBank(llmpress.load_model(tiny_model_folder))
    bank.add("a", folder)
    stored = (folder / "delta.safetensors").stat().st_size
    (folder / "delta.safetensors").write_bytes(bytes(stored))
    shutil.rmtree(folder)
    assert bank.nbytes("a") == pytest.approx(stored, rel=0.1)
    bank.use("a")
    assert bank.nbytes("a") == pytest.approx(stored, rel=0.1)
    expected = llmpress.load_finetuned(tiny_model_folder, deltas["tuned"])
    found, target = (logits(m, tiny_windows[:2]) for m in (bank.model, expected))
    torch.testing.assert_close(found, target, **TOLERANCE)


def test_what_does_not_fit_leaves_the_bank_as_it_was(
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    deltas: Deltas,
    bank: DeltaBank,
    tmp_path: Path,
    tiny_windows: Tensor,
) -> None:
    bank.use(["tuned", "grown"])
    before = logits(bank.model, tiny_windows[:2])
    damaged = shutil.copytree(deltas["tuned"], tmp_path / "damaged")
    (damaged / "delta.safetensors").write_bytes(b"none")
    with pytest.raises(ArtifactError, match=r"delta\.safetensors"):
        bank.add("damaged", damaged)
    other = tenant(tiny_finetuned_folder, tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"tiny-finetuned .*tiny-model"):
        bank.add("other", other)
    assert bank.names() == list(deltas)
    torch.testing.assert_close(logits(bank.model, tiny_windows[:2]), before, rtol=0, atol=0)
    elsewhere = DeltaBank(
        llmpress.load_model(tiny_model_folder), base_folder=str(tiny_finetuned_folder)
    )
    elsewhere.add("other", other)


def test_a_model_carries_one_thing_at_a_time(deltas: Deltas, bank: DeltaBank) -> None:
    model = bank.model
    with pytest.raises(ArtifactError, match="DeltaBank"):
        llmpress.load_delta(model, deltas["tuned"])
    with pytest.raises(ArtifactError, match="DeltaBank"):
        DeltaBank(model)
    with pytest.raises(ArtifactError):
        llmpress.remove_delta(model)
    bank.close()
    llmpress.load_delta(model, deltas["tuned"])
    with pytest.raises(ArtifactError, match=re.escape(str(deltas["tuned"]))):
        DeltaBank(model)
    llmpress.remove_delta(model)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    merged = DeltaBank(model)
    merged.add("a", deltas["tuned"])
    merged.use("a")
    llmpress.dequantized(model)
    with pytest.raises(ArtifactError, match=r"model\.layers\.0"):
        merged.use(None)
