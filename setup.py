"""Put the demo model into the wheel, as `inlaid/demo`. All other facts of the package are in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

DEMO = Path(__file__).parent / "models" / "demo"
PARTS = ("base", "adapters", "extra")


class BuildWithDemo(build_py):
    """The usual build, and the demo beside the modules. An editable install reads the demo from the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for part in PARTS:
                shutil.copytree(DEMO / part, Path(self.build_lib, "inlaid", "demo", part), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithDemo})
