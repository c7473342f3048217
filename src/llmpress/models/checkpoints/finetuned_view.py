"""A fine-tuned model rebuilt from its base and a delta, without files of its own."""

from torch import Tensor

from llmpress.core.errors import ArtifactError
from llmpress.models.architectures import vocabulary_names
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.dense_view import CheckpointView, delta_layer
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.checkpoints.finetuned_config import changed_config


class FinetunedCheckpoint(CheckpointView):
    """A base with its delta: linears are sums in fp32, other changed tensors exact.

    Configuration and tokenizer are the base's, but for what the delta says of the configuration.

    Args:
        base: What the delta was extracted from; of a compressed model its `DenseCheckpoint`.
        delta: As it was extracted, or compressed.

    Raises:
        ArtifactError: The delta was extracted from another base.
    """

    def __init__(self, base: Checkpoint, delta: DeltaFolder) -> None:
        super().__init__(base, delta.folder)
        self.delta = delta
        check_base(delta, base)
        self._linears = {
            f"{name}.weight" for name in delta.layers or delta.header.get("linears", {})
        }
        self._exact = set(delta.exact_names())
        self._in_base = set(base.names())
        self._names = set(self._in_base)
        self.config = changed_config(base.config, delta.config)
        self.config.tie_word_embeddings = bool(delta.header["tie_word_embeddings"])
        embeddings, head = vocabulary_names(base.skeleton())
        self.config.get_text_config().vocab_size = self.shape(embeddings)[0]
        if self.config.tie_word_embeddings:
            self._names.discard(head)

    @property
    def fingerprint(self) -> str:
        """What identifies the fine-tuned model that the delta was extracted from."""
        found: str = self.delta.header["finetuned"]["fingerprint"]
        return found

    def names(self) -> list[str]:
        """Return the names of the fine-tuned model's tensors, sorted."""
        return sorted(self._names | self._exact)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self.delta.exact_shape(name) if name in self._exact else self.base.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor: a changed linear's weight as fp32 ``[out, in]``."""
        if name in self._exact:
            return self.delta.exact(name, self.base.tensor(name) if name in self._in_base else None)
        tensor, layer = self.base.tensor(name), name.removesuffix(".weight")
        if name not in self._linears:
            return tensor
        if layer in self.delta.layers:
            return tensor.float() + delta_layer(layer, self.delta).dequantize()
        return tensor.float() + self.delta.tensor(name)


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
