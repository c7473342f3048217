"""What params.yaml says of calibration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CalibrationSettings:
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

    corpora: tuple[str, ...]
    windows: int
    length: int
    validation_windows: int = 2
    sensitivity_windows: int = 4
    autocast: bool = True
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.corpora or min(self.windows, self.validation_windows) < 1 or self.length < 2:
            raise ValueError(
                "calibration: at least one corpus, one window, one validation window "
                "and two tokens are needed"
            )
        if self.sensitivity_windows < 0:
            raise ValueError("calibration: sensitivity_windows must not be negative")

    @property
    def num_texts(self) -> int:
        """How many texts give windows."""
        return len(self.corpora) + len(self.tasks)
