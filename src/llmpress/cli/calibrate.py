"""``llmpress calibrate``: measure what a model's linear layers are given."""

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
    from llmpress import calibrate_model, fetch_model
    from llmpress.cli.options import quiet
    from llmpress.cli.output import bytes_text, print_facts, print_json
    from llmpress.core.artifacts import folder_bytes, free_place, read_json

    quiet()
    free_place(out, force=force)
    calibrate_model(
        fetch_model(model),
        text=text or (),
        out=out,
        windows=windows,
        length=length,
        seed=seed,
        device=device,
        force=force,
    )
    tokens, size = read_json(out / "index.json")["num_tokens"], folder_bytes(out)
    if as_json:
        print_json({"folder": str(out), "tokens": tokens, "bytes": size})
        return
    facts = [("folder", str(out)), ("tokens", f"{tokens:,}"), ("size", bytes_text(size))]
    print_facts(f"Calibrated {model}", facts)
