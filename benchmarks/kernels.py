"""Every operation on compressed weights against its floor and against what it replaces.

The floor is what the machine allows: bytes that must be read over the bandwidth, or operations over
the rate, both measured here. Before anything is timed, a result is compared with the formula in
fp64. Alternatives take turns, so that a machine whose speed drifts drifts for all. On a GPU the
kernels run, and its cache is emptied before each call; on a CPU the formulas, which unpack for
every call (benchmarks/decode.py measures models that keep what they unpacked), and torch's product
with 4-bit weights that layers use there. bitsandbytes runs beside where it is installed.

    python benchmarks/kernels.py --model Llama-2-7B --op codebook_matmul
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import torch
import typer
from tables import append_rows, origin
from torch import Tensor
from torch.nn import functional
from torch.utils.benchmark import Timer
from tqdm import tqdm

from llmpress.core.devices import pick_device
from llmpress.methods.delta_come import DeltaCoMe
from llmpress.nn.kernels import cpu
from llmpress.nn.kernels.codebook_grad import codebook_grad
from llmpress.nn.kernels.codebook_matmul import codebook_matmul, transposed_weight
from llmpress.nn.kernels.codebook_matmul.reference import codebook_weight
from llmpress.nn.kernels.delta_matmul import (
    PackedDeltas,
    PackedVectors,
    RowOwners,
    TripletGroup,
    delta_matmul,
)
from llmpress.nn.kernels.kmeans import kmeans
from llmpress.nn.kernels.kmeans.reference import draw_start, kmeans_reference
from llmpress.nn.kernels.quantized_matmul import quantized_matmul
from llmpress.nn.kernels.quantized_matmul.reference import quantized_weight
from llmpress.nn.packing import code_width, pack

SHAPES = {
    "SmolLM2-135M": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
    "Llama-2-7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "Llama-2-70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "Mixtral-8x7B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama-2-7B up": ((11008, 4096),),
    "tiny": ((48, 64),),
}
"""``[out, in]`` of the linears of a block."""
CODEBOOKS = ((65536, 4), (4096, 4), (256, 2), (8192, 6), (16384, 5))
GROUP = 128
TENANTS = (1, 8, 32)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest relative error, in the norm, of a result that is timed."""
OTHERS = ("dense", "naive", "written_out", "base", "loop", "batched", "bitsandbytes")
"""What operations are compared with."""
MOST_ENTRIES_ON_CPU = 4096
"""Of a table, that the reference of k-means is timed with there."""
Call = Callable[[], Any]


class Case(NamedTuple):
    """One operation on one shape.

    Attributes:
        variant: Its settings.
        run: What is timed.
        exact: The same from the formula, fp64; None where there is no single right result.
        others: What it replaces, by name.
        bytes_moved: What must be read and written at least.
        operations: Multiplications and additions.
    """

    variant: str
    run: Call
    exact: Callable[[], Tensor] | None
    others: dict[str, Call]
    bytes_moved: int
    operations: int


class Ceilings(NamedTuple):
    """What the machine was measured to do: bytes and operations a second."""

    bandwidth: float
    rate: float


def main(
    model: list[str] = typer.Option([], help="Whose shapes; repeatable. All on a GPU."),
    op: list[str] = typer.Option([], help="Which operations; repeatable. By default all."),
    rows: list[int] = typer.Option([1, 8, 64, 512], help="Rows of the input; repeatable."),
    dtype: str = typer.Option("", help="bfloat16, float16 or float32; the GPU's or CPU's usual."),
    device: str = typer.Option("", help="cpu or cuda; the best there is by default."),
    out: Path = typer.Option(Path("benchmarks/results/kernels.csv"), help="Rows are appended."),
) -> None:
    """Time operations and append a row for each."""
    place = pick_device(device or None)
    on_gpu = place.type == "cuda"
    kind: torch.dtype = getattr(torch, dtype or ("bfloat16" if on_gpu else "float32"))
    for name, chosen, known in (("model", model, SHAPES), ("op", op, OPERATIONS)):
        if unknown := set(chosen) - set(known):
            raise SystemExit(f"error: --{name}: {sorted(unknown)} unknown; known are {[*known]}")
    torch.manual_seed(0)
    ceilings = measured_ceilings(place, kind)
    shapes = {m: SHAPES[m] for m in model or (SHAPES if on_gpu else ("SmolLM2-135M",))}
    work = [
        (name, owner, shape, count)
        for name in op or OPERATIONS
        for owner in shapes
        for shape in dict.fromkeys(shapes[owner])
        for count in rows
        if count in OPERATIONS[name].rows(rows)
    ]
    for name, owner, (outputs, inputs), count in tqdm(work, desc="shapes", unit="shape"):
        x = torch.randn(count, inputs, device=place).to(kind)
        for case in OPERATIONS[name].cases(x, outputs):
            error = checked(name, case, kind)
            seconds = timed({"own": case.run, **case.others}, place)
            append_rows(
                out,
                [
                    {"op": name, "variant": case.variant, "model": owner}
                    | {"out": outputs, "in": inputs, "rows": count, "dtype": str(kind)[6:]}
                    | measures(case, seconds, ceilings)
                    | {"relative_error": error, "threads": torch.get_num_threads()}
                    | origin("triton" if on_gpu else "numpy")
                ],
            )


def checked(name: str, case: Case, dtype: torch.dtype) -> str:
    """Return the relative error of a result; refuse to time a wrong one."""
    if case.exact is None:
        return ""
    expected, found = case.exact(), case.run().double()
    error = float((found - expected).norm() / expected.norm())
    if not error < TOLERANCE[dtype]:
        raise SystemExit(f"error: {name} {case.variant}: off by {error:.1e}; it is not timed")
    return f"{error:.1e}"


def timed(calls: dict[str, Call], device: torch.device, rounds: int = 3) -> dict[str, list[float]]:
    """Return the seconds of single calls, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                from triton.testing import do_bench

                found = do_bench(call, warmup=5, rep=30, return_mode="all")
                seconds[name] += [1e-3 * t for t in found]
            else:
                seconds[name] += (
                    Timer("call()", globals={"call": call})
                    .blocked_autorange(min_run_time=0.05)
                    .times
                )
    return seconds


def measures(case: Case, seconds: dict[str, list[float]], ceilings: Ceilings) -> dict[str, Any]:
    """Return the columns of a row: milliseconds, ratios, and the share of the floor."""
    low, middle, high = spread(seconds["own"])
    floor = max(case.bytes_moved / ceilings.bandwidth, case.operations / ceilings.rate)
    columns: dict[str, Any] = {
        "ms_p20": f"{1e3 * low:.4g}",
        "ms_p50": f"{1e3 * middle:.4g}",
        "ms_p80": f"{1e3 * high:.4g}",
        "bytes_moved": case.bytes_moved,
        "operations": case.operations,
        "share_of_floor": f"{floor / middle:.3f}",
    }
    for name in OTHERS:
        others = seconds.get(name)
        columns[f"{name}_over_own"] = f"{spread(others)[1] / middle:.3f}" if others else ""
    return columns | {
        "measured_gb_per_s": round(ceilings.bandwidth / 1e9, 1),
        "measured_gflop_per_s": round(ceilings.rate / 1e9),
    }


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    tenths = quantiles(seconds, n=10) if len(seconds) > 1 else [seconds[0]] * 9
    return tenths[1], tenths[4], tenths[7]


def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a copy and a square matrix product."""
    size, side = (1 << 30, 8192) if device.type == "cuda" else (1 << 28, 2048)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device).to(dtype)
    found = timed({"copy": lambda: target.copy_(source), "matmul": lambda: square @ square}, device)
    return Ceilings(2 * size / spread(found["copy"])[1], 2 * side**3 / spread(found["matmul"])[1])


def codebook_cases(x: Tensor, outputs: int) -> Iterator[Case]:
    """Products with codebooks; ``naive`` looks every weight up and multiplies, for each call."""
    rows, inputs = x.shape
    for K, d in CODEBOOKS:
        codes = random_codes(inputs * -(-outputs // d), K, x.device)
        codebook = torch.randn(K, d, device=x.device).half()
        weight = codebook_weight(codes, codebook, None, inputs, outputs)
        yield Case(
            f"K={K} d={d}",
            lambda c=codes, b=codebook: codebook_matmul(x, c, b, None, outputs),
            lambda w=weight: x.double() @ w.double().t(),
            {
                "dense": products(x, weight),
                "naive": lambda c=codes, b=codebook: (
                    x @ codebook_weight(c, b, None, inputs, outputs).to(x.dtype).t()
                ),
                "written_out": lambda c=codes, b=codebook: (
                    x @ transposed_weight(x, c, b, None, outputs)
                ),
            },
            codes.nbytes + codebook.nbytes + x.nbytes + rows * outputs * x.element_size(),
            2 * rows * inputs * outputs,
        )


def gradient_cases(x: Tensor, outputs: int) -> Iterator[Case]:
    """Gradients of codebooks; ``naive`` forms the dense gradient and adds its vectors up."""
    rows, inputs = x.shape
    gradient = torch.randn(rows, outputs, device=x.device).to(x.dtype)
    for K, d in CODEBOOKS:
        indices = torch.randint(K, (inputs * -(-outputs // d),), device=x.device)
        codes = pack(indices, code_width(K))

        def dense(dtype: torch.dtype, i: Tensor = indices, K: int = K, d: int = d) -> Tensor:
            whole = x.to(dtype).t() @ functional.pad(gradient.to(dtype), (0, -outputs % d))
            vectors = whole.reshape(-1, d)
            return vectors.new_zeros(K, d).index_add_(0, i, vectors)

        yield Case(
            f"K={K} d={d}",
            lambda c=codes, K=K, d=d: codebook_grad(x, gradient, c, K, d),
            lambda f=dense: f(torch.float64),
            {"naive": lambda f=dense: f(x.dtype)},
            x.nbytes + gradient.nbytes + codes.nbytes + 4 * K * d,
            2 * rows * inputs * outputs,
        )


def quantized_cases(x: Tensor, outputs: int) -> Iterator[Case]:
    """Products with group-quantized weights; ``naive`` unpacks the weight for each call.

    ``compiled`` is the library for CPUs.
    """
    rows, inputs = x.shape
    groups = -(-inputs // GROUP)
    moved = x.nbytes + rows * outputs * x.element_size()
    for bits in (4, 3, 2):
        stored = (
            random_codes(outputs * inputs, 1 << bits, x.device),
            torch.rand(outputs, groups, device=x.device).half(),
            random_codes(outputs * groups, 1 << bits, x.device),
        )
        weight = quantized_weight(*stored, bits, GROUP, inputs)
        case = Case(
            f"bits={bits} group={GROUP}",
            lambda s=stored, b=bits: quantized_matmul(x, *s, b, GROUP),
            lambda w=weight: x.double() @ w.double().t(),
            {
                "dense": products(x, weight),
                "naive": lambda s=stored, b=bits: (
                    x @ quantized_weight(*s, b, GROUP, inputs).to(x.dtype).t()
                ),
            }
            | (bitsandbytes_product(x, weight) if bits == 4 else {})
            | written_out_product(x, stored, bits),
            sum(t.nbytes for t in stored) + moved,
            2 * rows * inputs * outputs,
        )
        yield case
        if x.is_cpu and rows <= cpu.MOST_ROWS and cpu.library() is not None:
            yield case._replace(
                variant=f"{case.variant} compiled",
                run=lambda s=stored, b=bits: cpu.packed_matmul(x, *s, b, GROUP),
            )


def written_out_product(x: Tensor, stored: tuple[Tensor, ...], bits: int) -> dict[str, Call]:
    """Return the product with a weight that a kernel writes out for each call, on a GPU."""
    if not x.is_cuda:
        return {}
    from llmpress.nn.kernels.quantized_matmul.dequantize import quantized_weight_triton

    widths = bits, GROUP, x.shape[1], x.dtype
    return {"written_out": lambda: x @ quantized_weight_triton(*stored, *widths).t()}


def delta_cases(x: Tensor, outputs: int) -> Iterator[Case]:
    """The base with each row's own delta of one bit.

    ``base`` is the base alone, ``loop`` multiplies tenant after tenant by unpacked factors, and
    ``batched`` multiplies a stack of them, one for each row, as servers of LoRA adapters do.
    """
    rows, inputs = x.shape
    base = torch.randn(outputs, inputs, device=x.device).to(x.dtype)
    spectrum = torch.arange(1, min(outputs, inputs) + 1, dtype=torch.float64) ** -2
    groups = DeltaCoMe(bits=1.0, group_size=GROUP).plan_groups(spectrum, outputs, inputs)
    for count in (n for n in TENANTS if n <= rows):
        deltas = [
            [
                TripletGroup(
                    bits,
                    random_vectors(rank, inputs, bits, x.device),
                    random_vectors(rank, outputs, bits, x.device),
                    1e-3 * torch.rand(rank, device=x.device),
                )
                for rank, bits in groups
            ]
            for _ in range(count)
        ]
        tenants = [row % count for row in range(rows)]
        own = PackedDeltas(deltas, GROUP), RowOwners(tenants)
        factors = [unpacked_factors(delta, inputs, outputs) for delta in deltas]
        # [tenants, in, r] and [tenants, r, out]
        right = torch.stack([V.t().to(x.dtype) for V, _ in factors])
        left = torch.stack([U.to(x.dtype) for _, U in factors])
        whose = torch.tensor(tenants, device=x.device)

        def exact(f: list[tuple[Tensor, Tensor]] = factors, w: Tensor = whose) -> Tensor:
            y = functional.linear(x, base).double()  # the base's outputs are given
            for tenant, (V, U) in enumerate(f):
                mine = w == tenant
                y[mine] += x[mine].double() @ V.double().t() @ U.double()
            return y

        def loop(n: int = count, w: Tensor = whose, r: Tensor = right, u: Tensor = left) -> Tensor:
            y = functional.linear(x, base)
            for tenant in range(n):
                mine = (w == tenant).nonzero()[:, 0]
                y.index_add_(0, mine, x[mine] @ r[tenant] @ u[tenant])
            return y

        def batched(w: Tensor = whose, r: Tensor = right, u: Tensor = left) -> Tensor:
            through = torch.bmm(x[:, None], r[w])
            return torch.baddbmm(functional.linear(x, base)[:, None], through, u[w])[:, 0]

        ranks = sum(rank for rank, _ in groups)
        others = {"base": products(x, base), "loop": loop}
        yield Case(
            f"tenants={count}",
            lambda o=own: delta_matmul(x, functional.linear(x, base), *o),
            exact,
            others | ({"batched": batched} if rows <= 64 else {}),  # a copy for each row
            base.nbytes + x.nbytes + count * delta_bytes(deltas[0]) + 2 * rows * outputs,
            2 * rows * (inputs * outputs + ranks * (inputs + outputs)),
        )


def kmeans_cases(x: Tensor, outputs: int) -> Iterator[Case]:
    """One iteration over the vectors of a matrix; ``naive`` forms distances in chunks.

    On a CPU `kmeans` is faiss, and of large tables it is timed alone: the reference would take
    longer than everything else here.
    """
    inputs = x.shape[1]
    for K, d in CODEBOOKS:
        points = torch.randn(outputs * inputs // d, d, device=x.device)
        weights = torch.ones(len(points), device=x.device)
        if len(points) < 2 * K:
            continue
        others = {
            "naive": lambda p=points, w=weights, K=K: kmeans_reference(
                p, draw_start(p, K, w, 0), w, 1
            )
        }
        yield Case(
            f"K={K} d={d}",
            lambda p=points, w=weights, K=K: kmeans(p, K, weights=w, iterations=1),
            None,
            {} if x.is_cpu and K > MOST_ENTRIES_ON_CPU else others,
            2 * points.nbytes + 8 * len(points),
            2 * 2 * len(points) * K * d,  # the iteration and the final assignment
        )


class Operation(NamedTuple):
    """How an operation is measured.

    Attributes:
        cases: Makes its cases from an input ``[rows, in]`` and the number of outputs.
        fewest_rows: Inputs with fewer rows are left out.
        any_rows: Whether the number of rows matters; otherwise only the first is measured.
    """

    cases: Callable[[Tensor, int], Iterator[Case]]
    fewest_rows: int = 1
    any_rows: bool = True

    def rows(self, asked: Sequence[int]) -> list[int]:
        """Return the numbers of rows to measure."""
        wanted = [count for count in asked if count >= self.fewest_rows]
        return wanted if self.any_rows else wanted[:1]


OPERATIONS = {
    "codebook_matmul": Operation(codebook_cases),
    "codebook_grad": Operation(gradient_cases, fewest_rows=64),
    "quantized_matmul": Operation(quantized_cases),
    "delta_matmul": Operation(delta_cases),
    "kmeans": Operation(kmeans_cases, any_rows=False),
}


def bitsandbytes_product(x: Tensor, weight: Tensor) -> dict[str, Call]:
    """Return the product with the weight in NF4, by its name; nothing where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.to(x.dtype), blocksize=GROUP, quant_type="nf4")
    return {"bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)}


def products(x: Tensor, weight: Tensor) -> Call:
    """Return the product with a dense weight in the input's dtype."""
    dense = weight.to(x.dtype)
    return lambda: functional.linear(x, dense)


def random_codes(count: int, below: int, device: torch.device) -> Tensor:
    """Return packed codes."""
    return pack(torch.randint(below, (count,), device=device), code_width(below))


def random_vectors(rank: int, length: int, bits: int, device: torch.device) -> PackedVectors:
    """Return quantized vectors."""
    groups = -(-length // GROUP)
    return PackedVectors(
        random_codes(rank * length, 1 << bits, device),
        torch.rand(rank, groups, device=device).half() / (1 << bits),
        random_codes(rank * groups, 1 << bits, device),
    )


def unpacked_factors(
    delta: Sequence[TripletGroup], inputs: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Return ``V [r, in]`` and ``diag(σ) U [r, out]`` of a delta, fp32."""
    right, left = [], []
    for group in delta:
        V, U = (
            quantized_weight(v.codes, v.scales, v.zero_points, group.num_bits, GROUP, length)
            for v, length in ((group.right, inputs), (group.left, outputs))
        )
        right.append(V)
        left.append(U * group.sigma[:, None])
    return torch.cat(right), torch.cat(left)


def delta_bytes(delta: Sequence[TripletGroup]) -> int:
    """Return what one tenant's delta takes."""
    return sum(
        sum(t.nbytes for v in (group.right, group.left) for t in v) + group.sigma.nbytes
        for group in delta
    )


if __name__ == "__main__":
    typer.run(main)
