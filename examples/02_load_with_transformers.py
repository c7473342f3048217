"""Open a compressed model with transformers alone: importing llmpress is all it takes.

python examples/02_load_with_transformers.py COMPRESSED
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmpress  # noqa: F401 - makes the format known to transformers


def main() -> None:
    """Load a compressed folder (or hub repository) and show what its layers are."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("compressed", help="what llmpress compress wrote, or owner/name on the hub")
    parser.add_argument("--prompt", default="def main(")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.compressed, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.compressed)
    print(model.model.layers[0])
    tokens = model.generate(**tokenizer(arguments.prompt, return_tensors="pt"), max_new_tokens=20)
    print(tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()
