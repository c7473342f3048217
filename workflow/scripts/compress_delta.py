"""Compress the delta of a fine-tuned model by one method."""

import dataclasses
from pathlib import Path

import typer

from llmpress.artifacts import artifact_folder, read_provenance
from llmpress.calibration import load_statistics
from llmpress.config import read_params, script_errors, section
from llmpress.delta_compression import compress_delta
from llmpress.delta_files import DeltaFolder
from llmpress.devices import pick_device
from llmpress.errors import ConfigError
from llmpress.resume import BlockStore
from llmpress.runs import build_method, read_delta_run


def main(
    key: str = typer.Argument(help="A key of `delta_runs` in params.yaml."),
    params: Path = typer.Option(Path("params.yaml"), help="The file of settings."),
) -> None:
    """Write data/compressed/KEY: delta.json, packed delta.safetensors and layers.json."""
    with script_errors():
        config = read_params(params)
        run = read_delta_run(config, key)
        method = build_method(run.method, run.settings, f"delta_runs.{key}")
        seed = section(config, "seed")
        delta, calibration = (
            Path("data/deltas") / run.finetuned,
            Path("data/calibration") / run.finetuned,
        )
        settings = {"method": run.method, **dataclasses.asdict(method), "seed": seed}
        with artifact_folder(
            Path("data/compressed") / key,
            stage="compress_delta",
            settings=settings,
            inputs={"delta": delta, "calibration": calibration},
        ) as folder:
            opened = DeltaFolder(delta, "delta")
            if opened.header["base"]["name"] != run.base:
                raise ConfigError(
                    f"delta_runs.{key}.base is {run.base!r}, but {delta} was made on "
                    f"{opened.header['base']['name']!r}"
                )
            fingerprints = {
                "delta": read_provenance(delta)["fingerprint"],
                "calibration": read_provenance(calibration)["fingerprint"],
            }
            store = BlockStore(f"compress-delta-{key}", {**settings, **fingerprints})
            compress_delta(
                opened,
                method,
                load_statistics(calibration),
                folder,
                method_name=run.method,
                seed=seed,
                store=store,
                device=pick_device(),
            )
        store.clear()


if __name__ == "__main__":
    typer.run(main)
