"""``llmpress calibrate``: measure what a model's linear layers are given."""

from pathlib import Path

from llmpress.cli.options import AsJson, Device, Force, Length, Model, Out, Seed, Text, Windows


def calibrate(
    model: Model,
    out: Out,
    text: Text = None,
    windows: Windows = 16,
    length: Length = 512,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Run a model over some text and store the statistics that methods use.

    One calibration serves every method: `llmpress compress --calibration FOLDER`.
    """
    from llmpress.calibration.files import load_windows
    from llmpress.cli.options import check_out, model_folder, quiet
    from llmpress.cli.output import bytes_text, print_facts, print_json
    from llmpress.core.artifacts import folder_bytes

    quiet()
    check_out(out, force=force)
    run_calibration(model_folder(model), text, out, windows, length, seed, device)
    used, _ = load_windows(out)
    record = {"folder": str(out), "tokens": used.numel(), "bytes": folder_bytes(out)}
    if as_json:
        print_json(record)
        return
    size = bytes_text(folder_bytes(out))
    facts = [("folder", str(out)), ("tokens", f"{used.numel():,}"), ("size", size)]
    print_facts(f"Calibrated {model}", facts)


def run_calibration(
    model: Path,
    text: list[Path] | None,
    out: Path,
    windows: int,
    length: int,
    seed: int,
    device: str | None,
    delta: Path | None = None,
) -> None:
    """Calibrate as the options say; with a delta, the model with this delta.

    Raises:
        ConfigError: No text was named.
    """
    from llmpress.calibration.settings import CalibrationSettings
    from llmpress.calibration.stage import calibrate_model
    from llmpress.cli.texts import calibration_texts, corpus_inputs
    from llmpress.core.devices import pick_device
    from llmpress.core.errors import ConfigError

    if not text:
        raise ConfigError("--text: name a text file or a corpus folder to calibrate on")
    texts = calibration_texts(text)
    settings = CalibrationSettings(tuple(texts), windows, length, max(1, windows // 8))
    calibrate_model(
        model,
        texts,
        settings,
        out,
        inputs=corpus_inputs(text),
        seed=seed,
        device=pick_device(device),
        delta=delta,
    )
