"""``y = x · Wᵀ`` with a vector-quantized ``W``, as a formula.

``W[j d + t, i] = s[j d + t] · C[code[i, j], t]`` with ``code [in, J]``, ``J = ceil(out / d)``,
``C [K, d]``; outputs beyond ``out`` are padding. Codes are packed, see `llmpress.nn.packing`.
"""

from torch import Tensor
from torch.nn import functional

from llmpress.nn.packing import code_width, unpack


def codebook_weight(
    codes: Tensor, codebook: Tensor, scales: Tensor | None, in_features: int, out_features: int
) -> Tensor:
    """Return ``W``, fp32 ``[out, in]``."""
    num_entries, vector_size = codebook.shape
    count = in_features * -(-out_features // vector_size)
    indices = unpack(codes, code_width(num_entries), count)
    return looked_up(indices, codebook, scales, in_features, out_features)


def looked_up(
    indices: Tensor, codebook: Tensor, scales: Tensor | None, in_features: int, out_features: int
) -> Tensor:
    """Return ``W``, fp32 ``[out, in]``, from unpacked codes ``[in * J]``."""
    # embedding, not indexing: its backward is the scatter-add dL/dC[k] = Σ dL/dv_n
    vectors = functional.embedding(indices, codebook.float())  # [in * J, d]
    weight = vectors.view(in_features, -1)[:, :out_features].t()
    return weight if scales is None else weight * scales.float().unsqueeze(1)


def codebook_matmul_reference(
    x: Tensor, codes: Tensor, codebook: Tensor, scales: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x Wᵀ``, ``[M, out]`` in the dtype of ``x [M, in]``; computed in fp32."""
    weight = codebook_weight(codes, codebook, scales, x.shape[1], out_features)
    return (x.float() @ weight.t()).to(x.dtype)
