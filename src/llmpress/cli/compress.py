"""``llmpress compress``: a model folder becomes a smaller one."""

from llmpress.cli.options import (
    AsJson,
    Bits,
    Calibration,
    Device,
    Force,
    Length,
    MethodName,
    Model,
    Out,
    Seed,
    Set,
    Text,
    Windows,
)

SUMMARY = ("folder", "kind", "method", "settings", "size")


def compress(
    model: Model,
    method: MethodName,
    out: Out,
    bits: Bits = None,
    set_: Set = None,
    text: Text = None,
    calibration: Calibration = None,
    windows: Windows = 16,
    length: Length = 512,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress the linear layers of a model's decoder blocks.

    The result is a Hugging Face folder with packed weights that transformers opens after
    `import llmpress`. A killed run continues after its last finished block when it is repeated.

    Example: llmpress compress data/models/smollm2 --method rtn --bits 3 --out smollm2-3bit
    """
    from llmpress import compress_model, fetch_model
    from llmpress.cli.inspect import print_made
    from llmpress.cli.options import chosen_method, quiet
    from llmpress.core.artifacts import free_place

    quiet()
    free_place(out, force=force)
    settings = chosen_method(method, bits, set_)
    compress_model(
        fetch_model(model),
        method=settings,
        out=out,
        text=text,
        calibration=calibration,
        windows=windows,
        length=length,
        seed=seed,
        device=device,
        force=force,
    )
    print_made(out, SUMMARY, as_json=as_json)
