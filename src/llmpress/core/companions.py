"""What lies beside a model's weights, by the names that transformers and publishers give it."""

TOKENIZERS = (
    "tokenizer*.json",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "special_tokens*.json",
    "added_tokens.json",
    "*.model",  # sentencepiece
    "*.model.v*",  # Mistral's versions of it
    "*.tiktoken",
    "tekken.json",
    "*.bpe",
    "bpe.codes",
    "dict.txt",
)
"""Files of tokenizers, slow ones too; never code."""
COMPANIONS = (
    *TOKENIZERS,
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "generation_config*.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
"""What comes along with a model, wherever it goes."""
