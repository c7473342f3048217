"""k-means: faiss against the formula, weights, and the traps of small inputs."""

import pytest
import torch

from llmpress.nn.kernels import kmeans as package
from llmpress.nn.kernels.dispatch import use_backend
from llmpress.nn.kernels.kmeans import kmeans
from llmpress.nn.kernels.kmeans.reference import draw_start, kmeans_reference, nearest_centroid


@pytest.mark.parametrize(
    ("N", "K", "d"), [(1, 1, 1), (7, 7, 3), (500, 16, 4), (3001, 64, 5), (40_000, 32, 2)]
)
def test_faiss_agrees_with_the_formula(N: int, K: int, d: int) -> None:
    points, weights = torch.randn(N, d), torch.rand(N) + 0.01
    centroids, codes = kmeans(points, K, weights=weights, iterations=6, seed=3)
    start = draw_start(points, K, weights, 3)
    expected, expected_codes = kmeans_reference(points, start, weights, 6)
    torch.testing.assert_close(centroids[codes], expected[expected_codes], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(codes, nearest_centroid(points, centroids))


def test_padding_small_inputs_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = torch.randn(2000, 4), torch.rand(2000) + 0.01
    padded = kmeans(points, 40, weights=weights, seed=1)
    monkeypatch.setattr(package, "FAISS_FAST_POINTS", 1)
    plain = kmeans(points, 40, weights=weights, seed=1)
    torch.testing.assert_close(padded[0], plain[0], rtol=1e-4, atol=1e-4)
    assert (padded[1] != plain[1]).float().mean() < 0.01


def test_heavy_points_are_served_first() -> None:
    points = torch.randn(4000, 4)
    weights = torch.where(torch.arange(4000) < 200, 100.0, 0.01)

    def error(centroids: torch.Tensor, codes: torch.Tensor) -> float:
        return float((weights * (centroids[codes] - points).square().sum(1)).sum())

    assert error(*kmeans(points, 64, weights=weights)) < 0.6 * error(*kmeans(points, 64))


def test_an_outlier_gets_into_the_start() -> None:
    points = torch.randn(10_000, 4) * 0.02
    points[77] = 6.0
    centroids, codes = kmeans(points, 16)
    torch.testing.assert_close(centroids[codes[77]], points[77])


def test_same_seed_same_result() -> None:
    points = torch.randn(900, 3)
    first, second, other = kmeans(points, 9), kmeans(points, 9), kmeans(points, 9, seed=1)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert bool((first[0] != other[0]).any())


@pytest.mark.parametrize("K", [0, 11])
def test_more_clusters_than_points_are_refused(K: int) -> None:
    with pytest.raises(ValueError, match=f"num_clusters={K}: .*10"):
        kmeans(torch.randn(10, 2), K)


def test_weights_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weights.*\[10\]"):
        kmeans(torch.randn(10, 2), 2, weights=torch.ones(9))


@pytest.mark.parametrize(("N", "K", "d"), [(1, 1, 1), (130, 65, 3), (500, 7, 4), (90, 64, 16)])
def test_the_kernel_finds_the_nearest_centroid(
    N: int, K: int, d: int, device: torch.device
) -> None:
    from llmpress.nn.kernels.kmeans.triton import nearest_centroid_triton

    points, centroids = torch.randn(N, d, device=device), torch.randn(K, d, device=device)
    centroids[K // 2] = centroids[0]  # of equals the first
    codes = nearest_centroid_triton(points, centroids)
    distances = torch.cdist(points.double(), centroids.double())
    torch.testing.assert_close(
        distances.gather(1, codes.unsqueeze(1))[:, 0], distances.min(dim=1).values
    )
    assert K == 1 or not bool((codes == K // 2).any())


def test_the_kernel_clusters_as_the_formula(device: torch.device) -> None:
    points, weights = torch.randn(400, 3, device=device), torch.rand(400, device=device)
    weights[:50] = 0  # points that weigh nothing, and so clusters that stay where they are
    start = torch.cat([points[:3], points[100:120], torch.full_like(points[:1], 9.0)])
    with use_backend("triton"):
        found, codes = kmeans(points, 24, weights=weights, iterations=4)
        again, _ = kmeans(points, 24, weights=weights, iterations=4)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    expected, expected_codes = kmeans_reference(
        points, draw_start(points, 24, weights, 0), weights, 4
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (codes != expected_codes).float().mean() < 0.01
    from llmpress.nn.kernels.kmeans.triton import kmeans_triton

    far, _ = kmeans_triton(points, start, weights, 2)
    torch.testing.assert_close(far[-1], start[-1])
