"""What transformers 4 reads, beside what transformers 5 writes, in a dense export.

Other tools pin transformers below 5. It does not know ``rope_parameters`` and takes a theta of
10,000 instead, without a word; nor ``dtype`` before 4.56, nor the class that transformers 5 names
for a tokenizer that is all in tokenizer.json. Newer versions read both, to the same effect.
"""

from pathlib import Path
from typing import Any

from llmpress.core.artifacts import read_json, write_json

TOKENIZER = "tokenizer_config.json"
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json with the older names of what it says, at every depth."""
    new = {k: with_older_names(v) if k.endswith("_config") and isinstance(v, dict) else v
           for k, v in config.items()}  # fmt: skip
    if "dtype" in config:
        new.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return new
    by_layer = {kind: own for kind, own in rope.items() if isinstance(own, dict)}
    whole = by_layer.get("full_attention", {}) if by_layer else rope
    is_neox = str(config.get("model_type", "")).startswith("gpt_neox")
    for name, of_neox in (
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "rotary_pct"),
    ):
        if name in whole:
            new.setdefault(of_neox if is_neox else name, whole[name])
    if whole.get("rope_type", "default") != "default":
        new.setdefault("rope_scaling", {k: v for k, v in whole.items() if k != "rope_theta"})
    if "rope_theta" in by_layer.get("sliding_attention", {}):
        new.setdefault("rope_local_base_freq", by_layer["sliding_attention"]["rope_theta"])
    return new


def name_older_tokenizer(folder: Path) -> None:
    """Give a folder's tokenizer the name of its class that both versions know."""
    if (folder / TOKENIZER).is_file():
        settings = read_json(folder / TOKENIZER)
        if (known := CLASSES.get(settings.get("tokenizer_class", ""))) is not None:
            write_json(folder / TOKENIZER, settings | {"tokenizer_class": known})
