"""Errors a user can act on: one line that names the thing and the remedy."""


class LLMPressError(Exception):
    """Anything llmpress reports to its user; the scripts print it as one line and exit with 1."""


class ConfigError(LLMPressError):
    """A setting is unknown, missing, of the wrong type, or contradicts another one."""


class SourceError(LLMPressError):
    """A model, corpus or task could not be fetched, or is not what its description says."""


class ArtifactError(LLMPressError):
    """A folder or file is damaged, incomplete, of another format version, or of another base."""


class NumericalError(LLMPressError):
    """Weights, statistics or activations hold NaN or Inf, or an algorithm broke down."""


class HubError(LLMPressError):
    """The hub refused an upload or could not be reached, or the repository is unfit for it."""
