"""Installed, llmpress is found by all of transformers without being imported."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_artifacts import Make

import llmpress

ROOT = Path(__file__).parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def fresh(tmp_path: Path) -> Run:
    """Run Python where llmpress is installed as by pip: its .pth is read at the start."""
    place = tmp_path / "installed"
    place.mkdir()
    shutil.copy(ROOT / "llmpress.pth", place)
    start = f"import site; site.addsitedir({str(place)!r})\n"
    (place / "sitecustomize.py").write_text(start)
    paths = [str(place), str(ROOT / "src")]

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_the_start_of_python_imports_next_to_nothing(fresh: Run) -> None:
    code = "import sys; print(*(m for m in sys.modules if m.startswith({})))"
    own = fresh("-c", code.format("'llmpress'")).stdout.split()
    assert sorted(own) == ["llmpress", "llmpress.core", "llmpress.core.registration"]
    heavy = "('torch', 'transformers', 'typing', 'importlib.util', 'numpy')"
    with_it = fresh("-c", code.format(heavy)).stdout.split()
    assert with_it == fresh("-S", "-c", code.format(heavy)).stdout.split() == []


def test_what_cannot_be_registered_hinders_nobody(fresh: Run) -> None:
    code = "import sys; sys.modules['llmpress.nn'] = None; import transformers.quantizers.auto"
    done = fresh("-c", code)
    assert done.returncode == 0
    assert done.stderr.count("llmpress cannot be imported") == 1


@pytest.mark.slow
def test_a_pipeline_generates(fresh: Run, compressed: Make) -> None:
    folder = compressed("rtn")
    code = (
        "from transformers import pipeline\n"
        f"made = pipeline('text-generation', model={str(folder)!r}, device='cpu', dtype='auto')\n"
        "text = made('import os', max_new_tokens=4, do_sample=False)[0]['generated_text']\n"
        "print(type(made.model.model.layers[0].mlp.up_proj).__name__, repr(text))"
    )
    done = fresh("-c", code)
    model, tokenizer = llmpress.load_model(folder, dtype="auto"), llmpress.load_tokenizer(folder)
    ids = tokenizer("import os", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert done.stdout == f"QuantizedLinear {text!r}\n", done.stderr


@pytest.mark.slow
def test_lm_eval_measures_the_compressed_model(
    fresh: Run, compressed: Make, tmp_path: Path
) -> None:
    items = [{"q": "import", "c": [" os", " sys", "=="], "l": n % 3} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "t.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}\ntest_split: test\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: l\n"
    )
    dense = llmpress.export_dense(compressed("rtn"), out=tmp_path / "dense", dtype="float32")
    scores = []
    for folder in (compressed("rtn"), dense):
        done = fresh(
            *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=auto"),
            *("--tasks", "tiny_choice", "--include_path", str(tmp_path), "--device", "cpu"),
            *("--output_path", str(tmp_path / folder.name), "--log_samples"),
        )
        assert done.returncode == 0, done.stderr
        (samples,) = (tmp_path / folder.name).rglob("samples_*.jsonl")
        rows = map(json.loads, samples.read_text().splitlines())
        scores.append([float(one[0][0]) for row in rows for one in row["resps"]])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert len(scores[0]) == 18


@pytest.mark.slow
def test_transformers_serves_it_to_a_client_of_openai(
    fresh: Run, compressed: Make, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compressed("rtn"), tmp_path / "served"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    code = (
        "import socket, subprocess, sys, time, openai\n"
        "with socket.socket() as free: free.bind(('127.0.0.1', 0)); port = free.getsockname()[1]\n"
        "command = [sys.executable, '-m', 'transformers.cli.transformers', 'serve']\n"
        "command += ['--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']\n"
        "server = subprocess.Popen(command, stdout=2)\n"
        "client = openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='x', timeout=60)\n"
        "asked = [{'role': 'user', 'content': 'import os'}]\n"
        "try:\n"
        "    for wait in range(120):\n"
        "        try: socket.create_connection(('127.0.0.1', port)).close(); break\n"
        "        except OSError: time.sleep(0.5)\n"
        f"    made = client.chat.completions.create(model={str(folder)!r}, messages=asked,\n"
        "        max_tokens=4, temperature=0)\n"
        "    print(repr(made.choices[0].message.content))\n"
        "finally: server.terminate(); server.wait()\n"
    )
    done = fresh("-c", code)
    model, tokenizer = llmpress.load_model(folder, dtype="auto"), llmpress.load_tokenizer(folder)
    asked = [{"role": "user", "content": "import os"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert done.stdout == f"{tokenizer.decode(new, skip_special_tokens=True)!r}\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_start_file_is_installed(kind: str, tmp_path: Path) -> None:
    names = ("pyproject.toml", "setup.py", "MANIFEST.in", "llmpress.pth", "README.md", "LICENSE")
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src/llmpress/core", tmp_path / "src/llmpress/core")
    shutil.copy(ROOT / "src/llmpress/__init__.py", tmp_path / "src/llmpress")
    code = f"from setuptools import build_meta; build_meta.build_{kind}('out')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("llmpress.pth").decode().startswith("import ")
