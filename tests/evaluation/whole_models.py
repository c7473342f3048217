"""Predictions of a model that runs as a whole, to compare others with."""

from torch import Tensor
from transformers import PreTrainedModel

from llmpress.evaluation.likelihood import Predictions


def running(model: PreTrainedModel, windows: Tensor) -> Predictions:
    """Return those of windows ``[W, T]``."""

    def predict(index: int, part: slice) -> Tensor:
        logits: Tensor = model(input_ids=windows[index : index + 1], use_cache=False).logits
        return logits[0, :-1][part]

    return predict
