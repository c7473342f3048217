"""What a server counts, for Prometheus."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from llmpress.serving.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper ends of the histograms' buckets."""


class Metrics:
    """Counters of one server, each by tenant.

    Args:
        engine: Is asked for what runs and what is free whenever metrics are read.
    """

    def __init__(self, engine: "Engine") -> None:
        self._registry = registry = CollectorRegistry()
        tenant: dict[str, Any] = {"labelnames": ["tenant"], "registry": registry}
        timed = {**tenant, "buckets": SECONDS}
        self._requests = Counter(
            "llmpress_requests", "Requests.", ["tenant", "status"], registry=registry
        )
        self._prompt_tokens = Counter("llmpress_prompt_tokens", "Tokens of prompts.", **tenant)
        self._new_tokens = Counter("llmpress_completion_tokens", "Tokens generated.", **tenant)
        self._seconds = Histogram(
            "llmpress_request_seconds", "From a request to the end of its answer.", **timed
        )
        self._first_seconds = Histogram(
            "llmpress_first_token_seconds", "From a request to its first token.", **timed
        )
        gauges = {
            "llmpress_requests_running": ("Requests that run or wait.", lambda: engine.running),
            "llmpress_requests_waiting": (
                "Of them, those beyond what is computed at once.",
                lambda: max(0, engine.running - engine.limits.requests),
            ),
            "llmpress_cache_free_ratio": ("Of keys and values.", engine.batcher.free_cache),
        }
        for name, (help_text, value) in gauges.items():
            Gauge(name, help_text, registry=registry).set_function(value)

    def count(self, notes: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count a request that has ended.

        Args:
            notes: ``tenant``, ``prompt_tokens``, ``completion_tokens``, ``first_token_seconds``, as
                far as it came.
            status: Of its answer.
            seconds: That it took.
        """
        tenant = notes.get("tenant", "")
        self._requests.labels(tenant, str(status)).inc()
        if tenant:
            self._seconds.labels(tenant).observe(seconds)
            self._prompt_tokens.labels(tenant).inc(notes["prompt_tokens"])
            self._new_tokens.labels(tenant).inc(notes.get("completion_tokens", 0))
            if (first := notes.get("first_token_seconds")) is not None:
                self._first_seconds.labels(tenant).observe(first)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        text: bytes = generate_latest(self._registry)
        return text
