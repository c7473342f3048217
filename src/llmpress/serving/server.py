"""A server from its command line's words to its end by a signal."""

import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from llmpress.core.errors import ConfigError, LLMPressError
from llmpress.core.failures import one_line
from llmpress.data.sources.pretrained import fetch_model
from llmpress.models.generation import plain_generation
from llmpress.models.loading import load_model, load_tokenizer
from llmpress.serving.api import build_app
from llmpress.serving.bank import DeltaBank
from llmpress.serving.engine import Engine, Limits
from llmpress.serving.logs import log, log_to_stdout


class _Server(uvicorn.Server):
    """Says that it ends; a signal is no error."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests and end after those that run; at once by a second signal."""
        del frame
        self._engine.ending, running = True, self._engine.running
        log("ending: no new requests are taken", signal=signal.Signals(sig).name, running=running)
        self.force_exit = self.should_exit
        self.should_exit = True


def listening_socket(host: str, port: int) -> socket.socket:
    """Take an address before anything is loaded.

    Raises:
        ConfigError: It is in use, or none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
        taken.listen(2048)
    except (OSError, OverflowError) as error:
        taken.close()
        raise ConfigError(
            f"{host}:{port}: {one_line(error)}; choose another --port or --host"
        ) from None
    return taken


def build_engine(
    model: str,
    deltas: Sequence[tuple[str, str]],
    *,
    name: str | None = None,
    tokenizers: Mapping[str, Path] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    limits: Limits | None = None,
) -> Engine:
    """Load a base and its deltas; one that cannot be used is refused, and the others are served.

    Args:
        model: The base: a folder, or ``owner/name@revision`` on the hub.
        deltas: Names and sources, as `delta_folder` takes them.
        name: Of the base in requests; by default its folder's or repository's.
        tokenizers: By name, folders of tokenizers that are not the base's.
        dtype: Of what is computed.
        device: Where.
        limits: What is taken at once.

    Raises:
        ConfigError: Two tenants of one name, or a model that cannot be served.
        ArtifactError: The base is none, or damaged.
    """
    base = name or model.rstrip("/").rpartition("/")[2].partition("@")[0]
    names = [base, *(each for each, _ in deltas)]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise ConfigError(f"two models are called {twice[0]!r}; give one another name")
    if unknown := sorted(set(tokenizers or ()) - set(names)):
        raise ConfigError(f"--tokenizer {unknown[0]}: no model has this name")
    folder, own = fetch_model(model), dict(tokenizers or {})
    tokenizer = load_tokenizer(own.pop(base, folder))
    loaded = load_model(folder, dtype=dtype, device=device)
    plain_generation(loaded, "do_sample", "temperature", "top_p", "top_k", "min_p")
    engine = Engine(DeltaBank(loaded, base_folder=folder), tokenizer, base, limits or Limits())
    for each, source in deltas:
        try:
            engine.add(each, source, own.get(each))
        except LLMPressError as error:
            log("delta refused", 40, tenant=each, source=source, error=one_line(error))
    return engine


def serve(engine: Engine, listener: socket.socket, *, api_key: str | None, grace: int) -> None:
    """Serve until a signal comes.

    Args:
        engine: Generates.
        listener: Where requests come in.
        api_key: That requests have to carry; None for none.
        grace: Seconds that running requests may take after the signal.
    """
    log_to_stdout()
    app = build_app(engine, api_key)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=grace, lifespan="on"
    )
    host, port = listener.getsockname()[:2]
    log("serving", address=f"http://{host}:{port}", models=list(engine.tenants))
    _Server(config, engine).run(sockets=[listener])
    log("ended")
