"""What pyproject.toml cannot say: node.toml lies beside the package and is shipped inside it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithSettings(build_py):
    """Copies node.toml into the package that is built; a checkout is read where it lies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "p2pmoe"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile("node.toml", folder / "node.toml")


setup(cmdclass={"build_py": BuildWithSettings})
