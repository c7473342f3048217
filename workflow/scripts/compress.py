"""Compress a model's linear layers by one method."""

import dataclasses
import math
from pathlib import Path

import torch
import typer

from llmpress.artifacts import artifact_folder, read_provenance
from llmpress.calibration import load_statistics
from llmpress.checkpoints import Checkpoint
from llmpress.compressed_checkpoints import write_compressed_model
from llmpress.compression import compress_layers, model_shapes
from llmpress.config import read_params, script_errors, section
from llmpress.hf import skeleton
from llmpress.resume import BlockStore
from llmpress.runs import build_method, read_run


def main(
    key: str = typer.Argument(help="A key of `runs` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/compressed/KEY: a Hugging Face folder with packed weights, and layers.json."""
    with script_errors():
        config = read_params(params)
        run = read_run(config, key)
        method = build_method(run.method, run.settings, f"runs.{key}")
        seed = section(config, "seed")
        model, calibration = Path("data/models") / run.model, Path("data/calibration") / run.model
        with artifact_folder(
            Path("data/compressed") / key,
            stage="compress",
            settings={"method": run.method, **dataclasses.asdict(method), "seed": seed},
            inputs={"model": model, "calibration": calibration},
        ) as folder:
            checkpoint = Checkpoint(model)
            empty = skeleton(checkpoint)
            model_weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
            store = BlockStore(
                f"compress-{key}",
                {
                    "method": run.method,
                    "settings": dataclasses.asdict(method),
                    "seed": seed,
                    "model": checkpoint.fingerprint,
                    "calibration": read_provenance(calibration)["fingerprint"],
                },
            )
            layers = compress_layers(
                model_shapes(empty),
                checkpoint,
                method,
                load_statistics(calibration),
                model_weights=model_weights,
                seed=seed,
                device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
                store=store,
            )
            write_compressed_model(checkpoint, layers, model_weights, folder)
        store.clear()


if __name__ == "__main__":
    typer.run(main)
