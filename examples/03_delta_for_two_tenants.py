"""Two fine-tuned models as one base in memory and two small deltas.

python examples/03_delta_for_two_tenants.py BASE FINETUNED OTHER_FINETUNED OUT
"""

import argparse
from pathlib import Path

import torch

import llmpress


def main() -> None:
    """Compress the deltas of two models of one base, and answer for one after the other."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("finetuned", type=Path, nargs=2)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()

    model = llmpress.load_model(arguments.base)
    prompt = llmpress.load_tokenizer(arguments.base)("import ", return_tensors="pt")
    for number, finetuned in enumerate(arguments.finetuned):
        extracted, delta = (arguments.out / f"{kind}-{number}" for kind in ("extracted", "tenant"))
        llmpress.extract_delta(arguments.base, finetuned, out=extracted)
        # better with some `text`, and the base
        llmpress.compress_delta(extracted, method="delta_come", bits=2.0, out=delta)
        llmpress.load_delta(model, delta)  # in place: the base's weights are not copied
        with torch.no_grad():
            exact = llmpress.load_model(finetuned)(**prompt).logits
            error = (model(**prompt).logits - exact).norm() / exact.norm()
        print(f"tenant {number}: logits differ by {float(error):.1e} from the fine-tuned model's")
        llmpress.remove_delta(model)


if __name__ == "__main__":
    main()
