"""``llmpress doctor``: what this machine computes with."""

from llmpress.cli.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Say which versions and kernels are in use on this machine."""
    from importlib.metadata import version

    import torch

    from llmpress.cli.output import print_json, print_table
    from llmpress.nn.kernels import cpu
    from llmpress.nn.kernels.dispatch import has_triton

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    triton = "from packed weights, by Triton" if has_triton() else "unpacked: install llmpress[gpu]"
    found = {
        "llmpress": version("llmpress"),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "products on a CPU": cpu.description(),
        "GPUs": ", ".join(gpus) or "none",
        "products on a GPU": triton if gpus else "none",
    }
    if as_json:
        print_json(found)
    else:
        print_table("This machine", ["", ""], [[name, value] for name, value in found.items()])
