"""Make transformers know llmpress's format from ``import llmpress`` on, without importing either.

transformers has a public registry of quantization methods but no way to announce one from outside,
and importing it takes seconds that ``llmpress --help`` or fetching a corpus have no use for. So the
registration waits until something imports the registry, and follows that import at once.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
# Named as text: what a stage computes depends on this module only where the stage imports it.
QUANTIZER = "llmpress.models.quantizer"


def register() -> None:
    """Register now where the registry is already imported, otherwise as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder(MetaPathFinder):
    """Waits for one module, finds it as everyone else would, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(QUANTIZER)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
