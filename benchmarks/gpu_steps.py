"""What `gpu_session.py` measures beside the tests and `kernels.py`; each step is a command.

A step prints its rows and appends them to a file of its own, one after the other, so that what was
measured before a time limit is kept.
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from tables import append_rows, origin
from torch import Tensor
from torch.nn import functional

from llmpress.core.devices import pick_device
from llmpress.methods.cluscomp.feedback import assign_with_feedback, improve_codes, refit_codebook
from llmpress.nn.kernels.codebook_grad import codebook_grad
from llmpress.nn.kernels.codebook_matmul import codebook_matmul
from llmpress.nn.kernels.codebook_matmul.reference import codebook_weight
from llmpress.nn.kernels.kmeans import kmeans
from llmpress.nn.layers.codebook import CodebookLinear
from llmpress.nn.layers.quantized import QuantizedLinear
from llmpress.nn.packing import code_width, pack
from llmpress.numerics.error_feedback import feed_errors_back
from llmpress.numerics.linalg import (
    damped_inverse_cholesky,
    relative_output_error,
    relative_weight_error,
    truncated_svd,
)

app = typer.Typer(no_args_is_help=True, add_completion=False)
OUT = typer.Option(Path("benchmarks/results"), help="Folder of the rows.")
DRY = typer.Option(False, help="Tiny shapes: only to see that the step runs.")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds of one call, the first one not counted where there are several."""
    if repeats > 1:
        call()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def write(out: Path, name: str, row: dict[str, Any]) -> None:
    """Append a row and print it."""
    append_rows(out / f"gpu_{name}.csv", [row | origin("triton", "transformers")])
    print(name, row, flush=True)


def matrix(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """Return a weight with some larger channels, as those of trained models have."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(outputs, inputs, device=device, generator=generator)
    weight *= torch.randn(inputs, device=device, generator=generator).mul(0.3).exp()
    return 0.02 * weight


def moment(inputs: int, device: torch.device) -> Tensor:
    """Return a second moment whose spectrum falls as one over the place."""
    generator = torch.Generator(device).manual_seed(1)
    falling = torch.arange(1, inputs + 1, device=device) ** -0.5
    mixed = torch.randn(2 * inputs, inputs, device=device, generator=generator) * falling
    turned = mixed @ torch.linalg.qr(torch.randn(inputs, inputs, device=device))[0]
    return turned.t() @ turned / len(turned)


@app.command()
def loops(out: Path = OUT, dry: bool = DRY) -> None:
    """Time what compresses a matrix: k-means, feedback, factorizations, errors."""
    device = pick_device()
    shapes = ((64, 96),) if dry else ((11008, 4096),)
    for outputs, inputs in shapes:
        weight, H = matrix(outputs, inputs, device), moment(inputs, device)
        for step, call, whole in matrix_steps(weight, H, dry):
            peak = 0.0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                took = seconds_of(call, device)
            except torch.OutOfMemoryError:
                took = float("nan")
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 1e9
            row = {"step": step, "out": outputs, "in": inputs, "seconds": f"{took:.4g}"}
            row |= {"whole_matrix_seconds": f"{took * whole:.4g}", "peak_gb": f"{peak:.2f}"}
            write(out, "loops", row)


def matrix_steps(
    weight: Tensor, H: Tensor, dry: bool
) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Yield what is timed, and how many times as long the whole matrix takes."""
    outputs, inputs = weight.shape
    device = weight.device
    yield "warm up", lambda: torch.linalg.cholesky(H + torch.eye(inputs, device=device)), 0
    yield "relative_output_error", lambda: relative_output_error(weight, 0.9 * weight, H), 1
    yield "relative_weight_error", lambda: relative_weight_error(weight, 0.9 * weight), 1
    yield "damped_inverse_cholesky", lambda: damped_inverse_cholesky(H, 0.01), 1
    factor = damped_inverse_cholesky(H, 0.01).factor
    channels = min(256, inputs)
    for K, d, iterations in ((16, 1, 2), (256, 2, 5), (8192, 6, 3), (65536, 4, 2)):
        if dry and K > 256:
            continue
        padded = functional.pad(weight.t(), (0, -outputs % d)).contiguous()
        points = padded.reshape(-1, d)
        felt = torch.rand(len(points), device=device)
        yield (
            f"kmeans K={K} d={d}, start and final codes",
            lambda p=points, K=K, f=felt: kmeans(p, K, weights=f, iterations=0),
            1,
        )
        yield (
            f"kmeans K={K} d={d}, {iterations} iterations more",
            lambda p=points, K=K, f=felt, i=iterations: kmeans(p, K, weights=f, iterations=i),
            20 / iterations,
        )
        codebook = points[torch.randperm(len(points), device=device)[:K]].contiguous()
        importance = torch.rand(padded.shape[1], device=device) + 0.1
        order = torch.arange(channels, device=device)
        columns = padded[:channels]
        yield (
            f"assign_with_feedback K={K} d={d}, {channels} channels",
            lambda c=columns, b=codebook, i=importance, o=order: assign_with_feedback(
                c, b, i, factor[:channels, :channels].contiguous(), o
            ),
            inputs / channels,
        )
        codes = torch.randint(K, (channels, padded.shape[1] // d), device=device)
        part = H[:channels, :channels].contiguous()
        yield (
            f"improve_codes K={K} d={d}, {channels} channels",
            lambda c=columns, b=codebook, k=codes, i=importance, h=part: improve_codes(
                c, b, k, i, h
            ),
            inputs / channels,
        )
        whole_codes = torch.randint(K, (inputs, padded.shape[1] // d), device=device)
        yield (
            f"refit_codebook K={K} d={d}",
            lambda c=padded, b=codebook, k=whole_codes, i=importance: refit_codebook(c, b, k, i, H),
            1,
        )
    grids = torch.rand(channels, outputs, device=device) + 0.1
    yield (
        f"feed_errors_back 4 bit, {channels} channels",
        lambda: feed_errors_back(
            weight.t()[:channels].clone(), factor[:channels, :channels], grids, grids, 4
        ),
        inputs / channels,
    )
    for kind in (torch.float32, torch.float64):
        typed = H.to(kind)
        yield f"eigh {str(kind)[6:]}", lambda t=typed: torch.linalg.eigh(t), 1
    yield "svd", lambda: truncated_svd(weight, min(weight.shape)), 1
    yield "qr", lambda: torch.linalg.qr(weight.t()), 1


@app.command()
def backward(out: Path = OUT, dry: bool = DRY) -> None:
    """Time the parts of the backward pass of a codebook's product at 8192 rows."""
    device = pick_device()
    rows, outputs, inputs = (32, 48, 64) if dry else (8192, 11008, 4096)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    gradient = torch.randn(rows, outputs, device=device, dtype=dtype)
    for K, d in ((16, 1),) if dry else ((65536, 4), (8192, 6), (256, 2)):
        columns = -(-outputs // d)
        codes = pack(torch.randint(K, (inputs * columns,), device=device), code_width(K))
        codebook = torch.randn(K, d, device=device)
        scales = torch.rand(outputs, device=device) + 0.5
        weight = codebook_weight(codes, codebook, scales, inputs, outputs).to(dtype)
        y = functional.linear(x, weight)
        parts: dict[str, Callable[[], Any]] = {
            "forward, dense": lambda w=weight: functional.linear(x, w),
            "forward, packed": lambda c=codes, b=codebook, s=scales: codebook_matmul(
                x, c, b, s, outputs
            ),
            "dequantize": lambda c=codes, b=codebook, s=scales: codebook_weight(
                c, b, s, inputs, outputs
            ).to(dtype),
            "to x, dense product": lambda w=weight: gradient @ w,
            "to codebook": lambda c=codes, K=K, d=d: codebook_grad(x, gradient, c, K, d),
            "to codebook, dense and index_add": lambda c=codes, K=K, d=d: _dense_gradient(
                x, gradient, c, K, d
            ),
            "to scales, as it is": lambda c=codes, b=codebook: (
                gradient.float() * codebook_matmul(x.float(), c, b, None, outputs)
            ).sum(0),
            "to scales, from the output": lambda v=y, s=scales: (
                (gradient.float() * v.float()).sum(0) / s
            ),
        }
        for part, call in parts.items():
            took = seconds_of(call, device, repeats=3)
            row = {"part": part, "K": K, "d": d, "rows": rows, "out": outputs, "in": inputs}
            write(out, "backward", row | {"ms": f"{1e3 * took:.4g}"})


def _dense_gradient(x: Tensor, gradient: Tensor, codes: Tensor, K: int, d: int) -> Tensor:
    from llmpress.nn.packing import unpack

    whole = x.t() @ functional.pad(gradient, (0, -gradient.shape[1] % d))
    vectors = whole.float().reshape(-1, d)
    indices = unpack(codes, code_width(K), len(vectors))
    return vectors.new_zeros(K, d).index_add_(0, indices, vectors)


def random_model(kind: str, device: torch.device, dry: bool) -> torch.nn.Module:
    """Return four decoder blocks of Llama-2-7B's shapes with random weights of a storage kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
        if dry
        else {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)).bfloat16().eval()
    if kind == "dense":
        return model
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    layer = random_layer(kind, linear, 16 if dry else 128)
                    setattr(owner, name, layer.to(device))
    return model


def random_layer(kind: str, linear: torch.nn.Linear, group: int) -> torch.nn.Module:
    """Return a packed layer of a linear's shape with random codes."""
    shape, device = (linear.out_features, linear.in_features), linear.weight.device
    if kind == "quantized-4":
        groups = shape[1] // group
        return QuantizedLinear.from_codes(
            torch.randint(16, shape, device=device),
            torch.full((shape[0], groups), 4e-3, device=device),
            torch.randint(16, (shape[0], groups), device=device),
            4,
            group,
        )
    K, d = (int(n) for n in kind.removeprefix("codebook-").split("x"))
    codes = torch.randint(K, (shape[1] * -(-shape[0] // d),), device=device)
    codebook = torch.randn(K, d, device=device)
    scales = torch.full((shape[0],), 0.02, device=device)
    return CodebookLinear.from_codes(codes, codebook, shape[1], shape[0], scales=scales)


KINDS = ("dense", "quantized-4", "codebook-8192x6", "codebook-65536x4", "codebook-256x2")


@app.command()
def decode(out: Path = OUT, dry: bool = DRY) -> None:
    """Time a decoding step of a random model: eager, and captured in a graph."""
    device = pick_device()
    if device.type != "cuda":
        print("decode: a GPU is needed for graphs; only eager steps run")
    for kind in KINDS if not dry else ("dense", "quantized-4", "codebook-16x2"):
        model = random_model(kind, device, dry)
        for rows in (1, 8, 64):
            tokens = torch.randint(100, (rows, 1), device=device)
            with torch.no_grad():
                body = model.model
                call = lambda m=body, t=tokens: m(t, use_cache=False)  # noqa: E731
                for _ in range(3):
                    call()
                eager = seconds_of(call, device, repeats=5)
                captured = launches = float("nan")
                if device.type == "cuda":
                    captured = _captured_seconds(call, device)
                    launches = _launches(call)
            held = sum(t.nbytes for t in (*body.parameters(), *body.buffers())) / 1e6
            row = {"kind": kind, "rows": rows, "blocks": 4, "eager_ms": f"{1e3 * eager:.4g}"}
            row |= {"graph_ms": f"{1e3 * captured:.4g}", "launches": launches, "mb": round(held)}
            write(out, "decode", row)
        del model, body, call
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _captured_seconds(call: Callable[[], Any], device: torch.device) -> float:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"decode: no graph ({str(error).splitlines()[0]})")
        return float("nan")
    return seconds_of(graph.replay, device, repeats=20)


def _launches(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in trace.key_averages() if "LaunchKernel" in e.key)


@app.command()
def syncs(out: Path = OUT, dry: bool = DRY) -> None:
    """Count where each stage waits for the GPU, on a small random model."""
    import sys
    import tempfile

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny_artifacts
    from tiny_artifacts import WEIGHT_METHODS, calibrate_tiny
    from tiny_models import build_tiny_model

    from llmpress.compression.stage import compress_model
    from llmpress.methods.registry import build_method
    from llmpress.models.loading import load_model
    from llmpress.tuning.stage import finetune_model

    device = pick_device()
    tiny_artifacts.CPU = device  # what calibrate_tiny computes on
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        build_tiny_model(root / "model")
        stages: dict[str, Callable[[], Any]] = {
            "calibrate": lambda: calibrate_tiny(root / "model", root / "calibration")
        }
        for name in WEIGHT_METHODS if not dry else ("rtn",):
            stages[f"compress {name}"] = lambda n=name: compress_model(
                root / "model",
                method=build_method(n, WEIGHT_METHODS[n], n),
                calibration=root / "calibration",
                seed=0,
                device=device,
                scratch=root / "scratch",
                out=root / n,
            )
        for name in ("cluscomp", "lillama") if not dry else ():
            stages[f"finetune {name}"] = lambda n=name: finetune_model(
                root / n,
                original=root / "model",
                calibration=root / "calibration",
                out=root / f"{n}-tuned",
                epochs=2,
                learning_rate=1e-3,
                method=build_method(n, WEIGHT_METHODS[n], n),
                seed=0,
                device=device,
                scratch=root / "scratch",
            )

        def generate() -> None:
            model = load_model(root / "rtn", device=device.type)
            model.generate(torch.ones(1, 4, dtype=torch.int64, device=device), max_new_tokens=8)

        stages["generate rtn"] = generate
        for stage, call in stages.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                took = seconds_of(call, device)
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            waits = [w for w in caught if "synchroniz" in str(w.message)]
            places = Counter(f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in waits)
            row = {"stage": stage, "seconds": f"{took:.3g}", "waits": len(waits)}
            top = "; ".join(f"{place} {n}" for place, n in places.most_common(8))
            write(out, "syncs", row | {"places": top})


if __name__ == "__main__":
    app()
