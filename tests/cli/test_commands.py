"""Every command does what it says, for people and for scripts."""

import math
from pathlib import Path

import pytest
import torch
from command_line import llmpress
from huggingface_hub.utils import are_progress_bars_disabled
from tiny_artifacts import Make
from transformers import AutoModelForCausalLM

from llmpress.cli.options import quiet
from llmpress.core.artifacts import read_json, sha256
from llmpress.deltas.applying import load_delta
from llmpress.methods.registry import known_methods
from llmpress.models.loading import load_model, load_tokenizer
from llmpress.nn.kernels import cpu
from llmpress.nn.layers.codebook import CodebookLinear

COMMANDS = [
    [],
    ["compress"],
    ["calibrate"],
    ["inspect"],
    ["generate"],
    ["compare"],
    ["export"],
    ["finetune"],
    ["methods"],
    ["doctor"],
    ["plan"],
    ["report"],
    ["delta"],
    ["delta", "extract"],
    ["delta", "compress"],
    ["delta", "apply"],
    ["delta", "export"],
    ["hub"],
    ["hub", "push"],
    ["hub", "fetch"],
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)))
    return path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_explains_every_option(command: list[str]) -> None:
    done = llmpress(*command, "--help")
    assert done.code == 0
    assert "Usage: llmpress" in done.out


def test_downloads_keep_their_progress_bar() -> None:
    quiet()
    assert not are_progress_bars_disabled()


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmpress.evaluation.inspection.describe", interrupted)
    done = llmpress("inspect", tmp_path)
    assert done.code == 130
    assert done.err.endswith("error: interrupted; the same command continues after the last "
                             "finished block\n")  # fmt: skip


def test_version() -> None:
    assert llmpress("--version").out.startswith("llmpress 0.")


def test_a_wrong_command_line_is_exit_code_2() -> None:
    assert llmpress("compress").code == 2
    assert llmpress("comprss").code == 2


def test_methods_lists_all_of_them() -> None:
    listed = llmpress("methods", "--json").json
    assert [method["name"] for method in listed] == known_methods()
    for method in listed:
        assert method["summary"]
        assert all(setting["meaning"] for setting in method["settings"]), method
    assert "vector_size" in llmpress("methods", "cluscomp").out


def test_doctor_says_how_products_are_computed() -> None:
    told = llmpress("doctor", "--json").json
    assert told["products on a CPU"] == cpu.description()
    assert told["products on a CPU"] in " ".join(llmpress("doctor").out.split())


def test_compress_with_text(tiny_model_folder: Path, text: Path, tmp_path: Path) -> None:
    done = llmpress("compress", tiny_model_folder, "-m", "cluscomp", "--bits", 4, "-o",
                    tmp_path / "out", "--set", "iterations=2", "--text", text, "--windows", 2,
                    "--length", 64, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["size"]["bits_per_weight"] <= 4
    assert done.json["settings"]["iterations"] == 2
    assert "calibration" in read_json(tmp_path / "out/provenance.json")["inputs"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp.up_proj, CodebookLinear)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_compress_without_calibration_says_so(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = llmpress("compress", tiny_model_folder, "-m", "svd", "-s", "rank=8", "-o",
                    tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    assert "bits per weight" in done.out
    assert not caplog.text  # without `whiten` it would change nothing
    done = llmpress("compress", tiny_model_folder, "-m", "cluscomp", "--bits", 4, "-s",
                    "iterations=1", "-o", tmp_path / "more")  # fmt: skip
    assert done.code == 0, done.err
    assert "cluscomp does better with calibration" in caplog.text


def test_the_same_command_gives_the_same_bytes_and_force_replaces(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    command = ["compress", tiny_model_folder, "-m", "rtn", "--bits", 3, "-s", "group_size=16",
               "-o", tmp_path / "out"]  # fmt: skip
    assert llmpress(*command).code == 0
    digest = sha256(tmp_path / "out/model.safetensors")
    assert str(tmp_path) in llmpress(*command).error
    assert llmpress(*command, "--force").code == 0
    assert sha256(tmp_path / "out/model.safetensors") == digest


def test_calibrate_once_compress_many(tiny_model_folder: Path, text: Path, tmp_path: Path) -> None:
    done = llmpress("calibrate", tiny_model_folder, "--text", text, "--windows", 2, "--length", 32,
                    "-o", tmp_path / "known", "--json")  # fmt: skip
    assert done.json["tokens"] == 64
    for method, setting in (("gptq", "group_size=16"), ("svd", "whiten=true")):
        done = llmpress("compress", tiny_model_folder, "-m", method, "--bits", 4, "-s", setting,
                        "--calibration", tmp_path / "known", "-o", tmp_path / method)  # fmt: skip
        assert done.code == 0, done.err


def test_inspect_tells_what_it_is(
    compressed: Make, compressed_delta: Path, tiny_delta: Path, calibration: Path,
    tiny_model_folder: Path,
) -> None:  # fmt: skip
    kinds = {
        compressed("gptq"): "compressed model",
        compressed_delta: "compressed delta",
        tiny_delta: "delta",
        calibration: "calibration",
        tiny_model_folder: "model",
    }
    for folder, kind in kinds.items():
        record = llmpress("inspect", folder, "--json").json
        assert record["kind"] == kind
        assert record["verified"] == (folder != tiny_model_folder)
        assert kind in llmpress("inspect", folder).out
    shown = llmpress("inspect", compressed("gptq"), "--layers").out
    assert shown.count("_proj") >= 21
    assert "All 21 layers" in shown


def test_generate_streams_and_counts(tiny_model_folder: Path) -> None:
    plain = llmpress("generate", tiny_model_folder, "def f(", "--max-tokens", 8)
    assert plain.code == 0, plain.err
    record = llmpress("generate", tiny_model_folder, "def f(", "--max-tokens", 8, "--json").json
    assert record["text"].strip() == plain.out.strip()
    assert 1 <= record["new_tokens"] <= 8
    piped = llmpress("generate", tiny_model_folder, "--max-tokens", 8, "--json", stdin="def f(")
    assert piped.json["text"] == record["text"]
    sampled = [
        llmpress("generate", tiny_model_folder, "def f(", "--max-tokens", 8, "--temperature", 1.5,
                 "--seed", seed, "--json").json["text"]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_with_a_delta_is_the_finetuned_model(
    tiny_model_folder: Path, compressed_delta: Path
) -> None:
    prompt = "class Handler:\n    def __init__(self"
    model = load_delta(load_model(tiny_model_folder), compressed_delta)
    tokenizer = load_tokenizer(tiny_model_folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    command = ["generate", tiny_model_folder, prompt, "--max-tokens", 24, "--dtype", "float32"]
    tuned = llmpress(*command, "--delta", compressed_delta, "--json").json["text"]
    assert tuned == tokenizer.decode(new, skip_special_tokens=True)
    assert tuned != llmpress(*command, "--json").json["text"]


def test_compare_a_model_with_itself_and_with_less(
    tiny_model_folder: Path, compressed: Make, text: Path
) -> None:
    command = ["compare", tiny_model_folder]
    options = ["--text", text, "--windows", 2, "--length", 64, "--json"]
    same = llmpress(*command, tiny_model_folder, *options).json["texts"][text.name]
    assert same["kl_divergence_nats"] == pytest.approx(0, abs=1e-6)
    assert same["top1_agreement"] == 1
    assert same["num_tokens"] == 2 * 63
    assert same["original_perplexity"] == same["other_perplexity"]
    less = llmpress(*command, compressed("rtn"), *options).json
    lost = less["texts"][text.name]
    assert lost["kl_divergence_nats"] > 1e-4
    assert lost["original_perplexity"] == same["original_perplexity"]
    assert lost["other_perplexity"] != same["original_perplexity"]
    assert lost["top1_agreement"] < 1
    assert lost["loss_difference_nats"] == pytest.approx(
        math.log(lost["other_perplexity"] / lost["original_perplexity"])
    )
    for key in ("loss_difference_stderr_nats", "kl_divergence_stderr_nats"):
        assert lost[key] > 0
    assert less["other_size"]["ratio"] > less["original_size"]["ratio"]
    shown = llmpress(*command, compressed("rtn"), *options[:-1]).out
    assert shown.count(" ± ") == 3
    assert "KL, nats" in shown


def test_one_window_has_no_error(tiny_model_folder: Path, compressed: Make, text: Path) -> None:
    command = ["compare", tiny_model_folder, compressed("rtn"), "--text", text, "--windows", 1]
    found = llmpress(*command, "--length", 64, "--json").json["texts"][text.name]
    assert found["kl_divergence_stderr_nats"] is None
    assert "±" not in llmpress(*command, "--length", 64).out


def test_a_delta_from_two_models_to_one(
    tiny_model_folder: Path, tiny_finetuned_folder: Path, text: Path, tmp_path: Path
) -> None:
    done = llmpress("delta", "extract", tiny_model_folder, tiny_finetuned_folder, "-o",
                    tmp_path / "delta")  # fmt: skip
    assert done.code == 0, done.err
    done = llmpress("delta", "compress", tmp_path / "delta", "-m", "delta_come", "--bits", 4, "-s",
                    "group_size=16", "--base", tiny_model_folder, "--text", text,
                    "--windows", 2, "--length", 64, "-o", tmp_path / "small", "--json")  # fmt: skip
    assert done.json["size"]["bits_per_weight"] <= 4
    options = ["--text", text, "--windows", 2, "--length", 64, "--json"]
    kl = {
        name: llmpress("compare", tiny_finetuned_folder, *other, *options).json["texts"][text.name][
            "kl_divergence_nats"
        ]
        for name, other in {
            "base": [tiny_model_folder],
            "base and delta": [tmp_path / "small", "--base", tiny_model_folder],
        }.items()
    }
    assert kl["base and delta"] < 0.2 * kl["base"]
    done = llmpress("delta", "apply", tiny_model_folder, tmp_path / "small", "-o",
                    tmp_path / "dense", "--dtype", "float32")  # fmt: skip
    assert done.code == 0, done.err
    dense = llmpress("compare", tiny_finetuned_folder, tmp_path / "dense", *options).json
    found = dense["texts"][text.name]["kl_divergence_nats"]
    assert found == pytest.approx(kl["base and delta"], rel=1e-3)


def test_export_dense(compressed: Make, tmp_path: Path) -> None:
    done = llmpress("export", compressed("svd"), "--dense", "--dtype", "float16", "-o",
                    tmp_path / "dense", "--json")  # fmt: skip
    assert done.json["dtype"] == "float16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert model.dtype == torch.float16
    assert "--format" in llmpress("export", compressed("svd"), "-o", tmp_path / "x").error
