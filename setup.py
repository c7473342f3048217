"""Install llmpress.pth beside the package, in wheels and in editable installs alike."""

from setuptools import setup
from setuptools.command.build_py import build_py


class WithStart(build_py):
    """Builds the package and what Python reads at its start."""

    def run(self) -> None:
        """Build; an editable install has no place but that of what is installed."""
        super().run()
        installed = self.get_finalized_command("install").install_lib
        self.copy_file("llmpress.pth", installed if self.editable_mode else self.build_lib)


setup(cmdclass={"build_py": WithStart})
