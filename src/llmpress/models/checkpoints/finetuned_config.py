"""What a fine-tune changed of its base's configuration: found, carried, and put back."""

import copy
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from transformers import PretrainedConfig

LEFT_OUT = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype"),
        *("id2label", "label2id", "problem_type", "quantization_config", "use_cache"),
        *("output_attentions", "output_hidden_states", "return_dict"),
        *("tie_word_embeddings", "vocab_size"),
    )
)
"""Entries that say nothing of what a model computes, or that a delta's tensors say."""
NOT_COMPUTED = (
    "*_token_id",
    "*dropout*",
    "*pdrop",
    "initializer_*",
    "router_aux_loss_coef",
    "*_bias",
)
"""Entries that change no logit by themselves: of generation, of training, of the weights' first
values, and whether there are biases, which a delta holds as tensors."""


def config_changes(base: PretrainedConfig, finetuned: PretrainedConfig) -> dict[str, Any]:
    """Return the entries of a fine-tuned model's configuration that differ from its base's.

    Of configurations inside the configuration only what differs is returned; other entries are
    returned whole. An entry that the fine-tuned one lacks is None.
    """
    return _differing(*(json.loads(c.to_json_string(use_diff=False)) for c in (base, finetuned)))


def changed_config(base: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """Return a copy of a configuration with what `config_changes` found."""
    config = copy.deepcopy(base)
    for key, value in changes.items():
        own = getattr(config, key, None)
        if isinstance(own, PretrainedConfig) and isinstance(value, Mapping):
            setattr(config, key, changed_config(own, value))
        else:  # transformers writes infinite numbers as {"__float__": "Infinity"}
            plain = json.loads(json.dumps(value), object_hook=_with_floats)
            setattr(config, key, plain)
    return config


def computed_changes(changes: Mapping[str, Any]) -> list[str]:
    """Return the names of the changed entries that change what the model computes, sorted."""
    names = []
    for key, value in changes.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            names += [f"{key}.{name}" for name in computed_changes(value)]
        elif not any(fnmatch(key, pattern) for pattern in NOT_COMPUTED):
            names.append(key)
    return sorted(names)


def _differing(base: Mapping[str, Any], finetuned: Mapping[str, Any]) -> dict[str, Any]:
    changes = {}
    for key in sorted({*base, *finetuned} - LEFT_OUT):
        old, new = base.get(key), finetuned.get(key)
        if key.endswith("_config") and isinstance(old, dict) and isinstance(new, dict):
            new = _differing(old, new)
            old = {}
        if old != new:
            changes[key] = new
    return changes


def _with_floats(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
