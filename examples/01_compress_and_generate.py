"""Compress a model, load the result and let it continue a text.

python examples/01_compress_and_generate.py MODEL OUT
"""

import argparse
from pathlib import Path

import llmpress


def main() -> None:
    """Compress to 4 bits by rounding to nearest, which needs no text."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face folder of safetensors")
    parser.add_argument("out", type=Path, help="the compressed model to write")
    parser.add_argument("--prompt", default="def main(")
    arguments = parser.parse_args()

    llmpress.compress_model(arguments.model, method="rtn", bits=4, group_size=64, out=arguments.out)
    model = llmpress.load_model(arguments.out)
    tokenizer = llmpress.load_tokenizer(arguments.out)
    prompt = tokenizer(arguments.prompt, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(tokens[0]))
    for folder in (arguments.model, arguments.out):
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{folder}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
