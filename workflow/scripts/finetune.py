"""Finetune a compressed model block by block against the original one."""

import dataclasses
from pathlib import Path

import typer

from llmpress.artifacts import artifact_folder, fingerprint
from llmpress.blocks import BlockWalk
from llmpress.calibration import load_windows
from llmpress.checkpoints import Checkpoint
from llmpress.compressed_checkpoints import rewrite_model
from llmpress.config import read_params, section
from llmpress.devices import pick_device
from llmpress.failures import script_errors
from llmpress.hf import skeleton
from llmpress.resume import BlockStore
from llmpress.runs import build_method, read_finetune, read_run
from llmpress.tuning import tune_blocks


def main(
    key: str = typer.Argument(help="A key of `finetunes` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/finetuned/KEY: the compressed model with trained codebooks or factors."""
    with script_errors():
        config = read_params(params)
        finetune = read_finetune(config, key)
        run = read_run(config, finetune.run)
        method = build_method(run.method, run.settings, f"runs.{finetune.run}")
        seed = section(config, "seed")
        inputs = {
            "compressed": Path("data/compressed") / finetune.run,
            "model": Path("data/models") / run.model,
            "calibration": Path("data/calibration") / run.model,
        }
        settings = {
            "run": finetune.run,
            **dataclasses.asdict(finetune.settings),
            "method": run.method,
            "method_settings": dataclasses.asdict(method),
            "seed": seed,
        }
        fingerprints = {role: fingerprint(path) for role, path in inputs.items()}
        store = BlockStore(f"finetune-{key}", {**settings, **fingerprints})
        out = Path("data/finetuned") / key
        with (
            store,  # kept until the artifact is complete
            artifact_folder(out, stage="finetune", settings=settings, inputs=inputs) as folder,
        ):
            device = pick_device()
            original, compressed = Checkpoint(inputs["model"]), Checkpoint(inputs["compressed"])
            teacher, student = (
                BlockWalk(skeleton(c), c, device=device, autocast=finetune.settings.autocast)
                for c in (original, compressed)
            )
            windows, validation = load_windows(inputs["calibration"])
            blocks = tune_blocks(
                teacher,
                student,
                method,
                windows,
                validation,
                finetune.settings,
                seed=seed,
                store=store,
            )
            rewrite_model(compressed, blocks, folder)


if __name__ == "__main__":
    typer.run(main)
