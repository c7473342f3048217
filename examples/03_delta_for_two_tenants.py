"""Two fine-tuned models as one base in memory and two small deltas.

python examples/03_delta_for_two_tenants.py BASE FINETUNED OTHER_FINETUNED OUT
"""

import argparse
from pathlib import Path

import torch

import llmpress
from llmpress.deltas.compression import compress_delta_artifact
from llmpress.deltas.extraction import extract_delta_artifact
from llmpress.methods.registry import build_method


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
        extract_delta_artifact(arguments.base, finetuned, extracted)
        compress_delta_artifact(
            extracted,
            delta,
            method_name="delta_come",
            method=build_method("delta_come", {"bits": 2.0}, "example"),
            calibration=None,  # better with one, of the fine-tuned model
            seed=0,
            device=torch.device("cpu"),
        )
        llmpress.load_delta(model, delta)  # in place: the base's weights are not copied
        with torch.no_grad():
            exact = llmpress.load_model(finetuned)(**prompt).logits
            error = (model(**prompt).logits - exact).norm() / exact.norm()
        print(f"tenant {number}: logits differ by {float(error):.1e} from the fine-tuned model's")
        llmpress.remove_delta(model)


if __name__ == "__main__":
    main()
