"""Turn a compressed model into a plain checkpoint for tools that do not know llmpress.

python examples/04_export_for_other_tools.py COMPRESSED OUT
"""

import argparse
import subprocess
import sys
from pathlib import Path

import llmpress

# Another program: it imports transformers and nothing of llmpress.
OTHER_TOOL = """
import sys
sys.modules["llmpress"] = None  # as where it is not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__name__, "of", model.dtype, "with", model.num_parameters(), "weights")
"""


def main() -> None:
    """Write the dense bf16 weights that a compressed model stands for, and open them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--delta", type=Path, help="a compressed delta to add to the model")
    arguments = parser.parse_args()

    llmpress.export_dense(arguments.compressed, out=arguments.out, delta=arguments.delta)
    subprocess.run([sys.executable, "-c", OTHER_TOOL, str(arguments.out)], check=True)


if __name__ == "__main__":
    main()
