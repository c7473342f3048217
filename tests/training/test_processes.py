"""Several processes, started by accelerate's launcher, train what one process trains."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tiny_models import build_tiny_model
from torch.testing import assert_close

from llmpress.core.artifacts import artifact_folder, read_json, read_provenance, verify

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parents[2] / "workflow/scripts"
ITEMS = [{"query": f"What is {n} + 1?", "target": f" {n + 1}"} for n in range(40)]
STEPS = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3, "precision": "float32"}
LORA = {"start": "models/tiny", "model": "tiny", "trains": "lora", "task": "sums"}
PARAMS = {
    "seed": 0,
    "finetuned_models": {
        "full": {"base": "tiny", "task": "sums", **STEPS, "added_tokens": ["<a>"]}
    },
    "trainings": {"lora": {**LORA, "settings": {**STEPS, "held_out": 5, "check_every": 2}}},
}
STAGES = {  # script and key: the artifact and its weights
    ("train_task", "full"): ("data/models/full", "model.safetensors"),
    ("train", "lora"): ("data/trained/lora", "adapter_model.safetensors"),
}
# Runs a script; the second of two processes dies in the fourth step.
DYING = """
import os, runpy, signal, sys
from accelerate import Accelerator
clip, steps = Accelerator.clip_grad_norm_, []
def dying(*arguments):
    steps.append(clip(*arguments))
    if len(steps) == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Accelerator.clip_grad_norm_ = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def two(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes on a CPU."""
    module = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    return run(project, *module, "--main_process_port", "0", *command)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    build_tiny_model(root / "data/models/tiny")
    with artifact_folder(root / "data/tasks/sums", stage="fetch_task", settings={}, inputs={}) as f:
        (f / "train.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")
    return root


@pytest.mark.parametrize("stage", STAGES, ids=[script for script, _ in STAGES])
def test_two_processes_train_what_one_trains(project: Path, stage: tuple[str, str]) -> None:
    script, key = stage
    command = (str(SCRIPTS / f"{script}.py"), key)
    out, weights = project / STAGES[stage][0], STAGES[stage][1]
    done = run(project, *command)
    assert done.returncode == 0, done.stderr
    alone = out.rename(out.with_name("alone"))
    done = two(project, *command)
    assert done.returncode == 0, done.stderr
    verify(out)
    assert sorted(p.name for p in out.parent.iterdir() if p.name[0] == ".") == []
    assert not (project / "scratch").exists()
    assert read_provenance(out)["settings"] == {
        **read_provenance(alone)["settings"],
        "processes": 2,
    }
    one, both = (read_json(folder / "training.json") for folder in (alone, out))
    assert both["losses"] == pytest.approx(one["losses"], rel=1e-5)
    # AdamW divides by the size of gradients: near zero rounding decides the sign of a step
    assert_close(load_file(out / weights), load_file(alone / weights), atol=2e-4, rtol=1e-2)

    if script == "train":  # one of the two dies, and then both continue
        whole = read_json(out / "training.json"), (out / weights).read_bytes()
        out.rename(out.with_name("both"))
        (project / "dying.py").write_text(DYING, encoding="utf-8")
        died = two(project, "dying.py", *command)
        assert died.returncode not in (0, -signal.SIGKILL), died.stderr
        assert not out.exists()
        [store] = (project / "scratch").iterdir()
        assert [path.name for path in store.glob("step-*.json")] == ["step-000002.json"]
        done = two(project, *command)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("continues after step 2,") == 1
        assert (read_json(out / "training.json"), (out / weights).read_bytes()) == whole
