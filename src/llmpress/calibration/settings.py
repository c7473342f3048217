"""What params.yaml says of calibration."""

from dataclasses import dataclass

from llmpress.core.settings import Corpora, Count, Natural, Settings, Task, Tokens


@dataclass(frozen=True)
class CalibrationSettings(Settings):
    """How much text of which corpora a model is calibrated on.

    Attributes:
        corpora: Names of corpora; mixing domains keeps each of them alive.
        windows: Windows per text that statistics and finetuning see.
        validation_windows: Windows per text, of other documents, that finetuning is judged by.
        length: Tokens of a window.
        sensitivity_windows: Windows per text of which gradients are taken too, at most
            ``windows``: how much the loss feels each output of each layer. 0 leaves that out.
        autocast: Run the model in bf16 where a matrix product allows it.
        tasks: Names of tasks whose training items are text too: what a fine-tuned model was made
            for.
    """

    corpora: Corpora
    windows: Count
    length: Tokens
    validation_windows: Count = 2
    sensitivity_windows: Natural = 4
    autocast: bool = True
    tasks: tuple[Task, ...] = ()

    @property
    def num_texts(self) -> int:
        """How many texts give windows."""
        return len(self.corpora) + len(self.tasks)
