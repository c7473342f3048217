"""The gradient of a codebook, as a formula.

``dL/dC[k, t] = Σ_{code[i, j] = k} Σ_m x[m, i] g[m, j d + t]``: the dense gradient ``xᵀ g``, its
vectors added up by their codes.
"""

import torch
from torch import Tensor

from llmpress.nn.packing import code_width, unpack


def codebook_grad_reference(
    x: Tensor, gradient: Tensor, codes: Tensor, num_entries: int, vector_size: int
) -> Tensor:
    """Return ``dL/dC``, fp32 ``[K, d]``."""
    in_features, out_features = x.shape[1], gradient.shape[1]
    columns = -(-out_features // vector_size)
    indices = unpack(codes, code_width(num_entries), in_features * columns).long()
    padded = torch.nn.functional.pad(gradient.float(), (0, columns * vector_size - out_features))
    of_vectors = (x.float().t() @ padded).view(-1, vector_size)  # [in * J, d]
    return of_vectors.new_zeros(num_entries, vector_size).index_add_(0, indices, of_vectors)
