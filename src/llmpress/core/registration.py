"""Make transformers know the format wherever llmpress is installed, without importing either.

transformers has a public registry of quantization methods but no way to announce one from outside,
and importing it takes seconds that most programs have no use for. So the registration waits until
something imports the registry, and follows that import at once. llmpress.pth, which is installed
beside the package, imports this at the start of every Python: nothing is imported here but ``sys``.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
# Named as text: what a stage computes depends on this module only where the stage imports it.
QUANTIZER = "llmpress.models.quantizer"


def register() -> None:
    """Register now where the registry is already imported, otherwise as soon as it is."""
    if REGISTRY in sys.modules:
        _import_quantizer()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


def _import_quantizer() -> None:
    """Register; where that is impossible, let programs that need no llmpress go on."""
    import importlib

    try:
        importlib.import_module(QUANTIZER)
    except ImportError as error:
        import logging

        message = "llmpress cannot be imported, models that it compressed cannot be opened: %s"
        logging.getLogger(__name__).warning(message, error)


class _RegistryFinder:
    """Waits for one module, finds it as everyone else would, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _import_quantizer()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
