"""A fine-tuned model rebuilt from its base and an extracted delta, without files of its own."""

from torch import Tensor

from llmpress.core.errors import ArtifactError
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import CheckpointView
from llmpress.models.checkpoints.files import Checkpoint


class FinetunedCheckpoint(CheckpointView):
    """A base with its extracted delta: linears are sums in fp32, other changed tensors exact.

    Configuration and tokenizer are the base's, but for the size of the vocabulary and whether head
    and embeddings are shared.

    Args:
        base: What the delta was extracted from; of a compressed model its `DenseCheckpoint`.
        delta: Of kind ``delta``.

    Raises:
        ArtifactError: The delta was extracted from another base.
    """

    def __init__(self, base: Checkpoint, delta: DeltaFolder) -> None:
        super().__init__(base, delta.folder)
        self.delta = delta
        check_base(delta, base)
        self._linears = {f"{name}.weight" for name in delta.header["linears"]}
        self._exact = set(delta.exact_names())
        self._in_base = set(base.names())
        self.config.tie_word_embeddings = bool(delta.header["tie_word_embeddings"])
        model = base.skeleton()
        embeddings = model.get_input_embeddings()
        name = next(n for n, module in model.named_modules() if module is embeddings)
        self.config.get_text_config().vocab_size = self.shape(f"{name}.weight")[0]

    @property
    def fingerprint(self) -> str:
        """What identifies the fine-tuned model that the delta was extracted from."""
        found: str = self.delta.header["finetuned"]["fingerprint"]
        return found

    def names(self) -> list[str]:
        """Return the names of the fine-tuned model's tensors, sorted."""
        return sorted({*self.delta.header["unchanged"], *self._linears, *self._exact})

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.delta.exact_shape(name) if name in self._exact else self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor: a changed linear's weight as fp32 ``[out, in]``."""
        if name in self._exact:
            return self.delta.exact(name, self.base.tensor(name) if name in self._in_base else None)
        tensor = self.base.tensor(name)
        return tensor.float() + self.delta.tensor(name) if name in self._linears else tensor


def check_base(delta: DeltaFolder, base: Checkpoint) -> None:
    """Refuse a base that a delta was not made on.

    Raises:
        ArtifactError: It is another model.
    """
    needed = delta.header["base"]
    if (found := base.fingerprint) != needed["fingerprint"]:
        raise ArtifactError(
            f"{delta.folder}: made on base {needed['name']} ({needed['fingerprint'][:12]}), but "
            f"{base.folder} is another model ({found[:12]}); name the delta's own base"
        )
