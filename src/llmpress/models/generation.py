"""How a model generates where a command or a measurement decides that, not the model's files."""

from transformers import GenerationConfig, PreTrainedModel

KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens"),
    *("bad_words_ids", "repetition_penalty", "no_repeat_ngram_size", "cache_implementation"),
)
"""What says which tokens may come; beams, sampling and forms of output are the caller's."""


def plain_generation(model: PreTrainedModel, *further: str) -> None:
    """Keep of a model's generation_config.json what holds whoever generates, in place.

    Args:
        model: What generates.
        further: Settings that are to hold as well.
    """
    published = getattr(model, "generation_config", None)
    values = {name: getattr(published, name, None) for name in (*KEPT, *further)}
    kept = {name: value for name, value in values.items() if value is not None}
    model.generation_config = GenerationConfig(**kept)
