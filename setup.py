"""What pyproject.toml cannot say: llmpress.pth beside the package, and the products for CPUs."""

from setuptools import Extension, setup
from setuptools.command.build_py import build_py


class WithStart(build_py):
    """Builds the package and what Python reads at its start."""

    def run(self) -> None:
        """Build; an editable install has no place but that of what is installed."""
        super().run()
        installed = self.get_finalized_command("install").install_lib
        self.copy_file("llmpress.pth", installed if self.editable_mode else self.build_lib)


MATHS = ["-ffp-contract=fast", "-fno-math-errno"]

# A plain C library that ctypes loads: it needs neither Python's nor torch's headers. Where there is
# no compiler, llmpress is installed without it, and `llmpress doctor` says so.
PRODUCTS = Extension(
    "llmpress.nn.kernels.cpu._products",
    ["src/llmpress/nn/kernels/cpu/products.cpp"],
    extra_compile_args=["-std=c++17", "-O3", "-g0", "-w", "-fvisibility=hidden", *MATHS],
    py_limited_api=True,
    optional=True,
)

setup(
    cmdclass={"build_py": WithStart},
    ext_modules=[PRODUCTS],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
