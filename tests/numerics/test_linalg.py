import pytest
import torch

from llmpress.numerics.linalg import (
    damped_cholesky,
    damped_inverse_cholesky,
    gram,
    relative_output_error,
    relative_weight_error,
    truncated_svd,
)


def moment(size: int, tokens: int) -> torch.Tensor:
    inputs = torch.randn(tokens, size)
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("size", [1, 2, 33])
def test_factor_of_the_inverse(size: int) -> None:
    H = moment(size, 100)
    C, dampening, attempts = damped_inverse_cholesky(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(size)
    torch.testing.assert_close(C.T @ C, damped.inverse(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(C, C.triu())
    assert (dampening, attempts) == (0.01, 1)


def test_dampening_rises_tenfold_until_the_factorization_holds() -> None:
    H = torch.eye(4)
    H[0, 0] = -0.05  # definite once more than 0.05 is added; the mean diagonal entry is 0.7375
    L, dampening, attempts = damped_cholesky(H, 0.001)
    assert (round(dampening, 9), attempts) == (0.1, 3)
    damped = H + dampening * 0.7375 * torch.eye(4)
    torch.testing.assert_close(L @ L.T, damped)


def test_dampening_starts_somewhere_after_zero() -> None:
    _, dampening, attempts = damped_cholesky(torch.ones(3, 3), 0.0)
    assert dampening > 0
    assert attempts > 1


def test_hopeless_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="diagonal"):
        damped_cholesky(torch.zeros(3, 3), 0.01)
    with pytest.raises(ValueError, match="dampening"):
        damped_cholesky(torch.eye(3), -0.1)
    hopeless = torch.tensor([[1.0, 1e6], [1e6, 1.0]])
    with pytest.raises(ValueError, match="matrix of size 2"):
        damped_cholesky(hopeless, 0.01)


@pytest.mark.parametrize("shape", [(1, 1), (7, 20), (20, 7)], ids=str)
def test_full_rank_svd_is_exact_and_signs_are_fixed(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    U, S, V = truncated_svd(matrix, min(shape))
    torch.testing.assert_close((U * S) @ V, matrix, rtol=1e-4, atol=1e-5)
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())


def test_svd_error_is_what_was_cut() -> None:
    matrix = torch.randn(30, 50)
    U, S, V = truncated_svd(matrix, 10)
    cut = torch.linalg.svdvals(matrix)[10:].square().sum() / matrix.square().sum()
    assert relative_weight_error(matrix, (U * S) @ V) == pytest.approx(float(cut), rel=1e-3)


@pytest.mark.parametrize("rank", [0, 4])
def test_rank_outside_the_matrix_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank}"):
        truncated_svd(torch.randn(3, 5), rank)


def test_output_error_is_the_mean_over_tokens() -> None:
    inputs = torch.randn(200, 12)
    weight, other = torch.randn(5, 12), torch.randn(5, 12)
    expected = (inputs @ (weight - other).T).square().sum() / (inputs @ weight.T).square().sum()
    error = relative_output_error(weight, other, inputs.T @ inputs / 200)
    assert error == pytest.approx(float(expected), rel=1e-4)


def test_errors_of_a_zero_weight() -> None:
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    assert relative_weight_error(zero, zero) == 0
    assert relative_weight_error(zero, one) == float("inf")
    assert relative_output_error(one, zero, torch.zeros(2, 2)) == 0


@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 5), (70, 257), (30, 600)])
def test_gram_is_the_product_with_itself(m: int, n: int) -> None:
    x = torch.randn(m, n)
    found = gram(x)
    torch.testing.assert_close(found.double(), x.double().t() @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, found.t(), rtol=0, atol=0)
