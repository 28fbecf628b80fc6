"""The wheel as somebody without the clone meets it: built, installed in an environment of its own, served and asked."""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built of a copy: a build folder in the clone would keep modules that are gone."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in ("inlaid", "models/demo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder))
    (made,) = folder.glob("*.whl")
    return made


def without_the_clone() -> dict[str, str]:
    """Return the environment less PYTHONPATH: the clone's inlaid.egg-info there would count as an installed inlaid."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(*arguments: str, python: Path | None = None) -> None:
    chosen = [] if python is None else ["--python", str(python)]
    command = [sys.executable, "-m", "pip", *chosen, "--quiet", *arguments]
    subprocess.run(command, check=True, timeout=1800, env=without_the_clone())


def test_the_wheel_holds_the_demo_and_every_file_of_the_package(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "inlaid").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [name for path in files if (name := path.relative_to(ROOT).as_posix()) not in packed] == []
    demo = [path for part in ("base", "adapters", "extra") for path in (ROOT / "models/demo" / part).rglob("*.*")]
    assert len(demo) > 24
    names = [f"inlaid/{path.relative_to(ROOT / 'models').as_posix()}" for path in demo]
    assert [name for name in names if name not in packed] == []
    assert [name for name in packed if not name.startswith("inlaid")] == []  # no houses beside the package


@pytest.mark.timeout(1800)  # with --long pip fetches torch
def test_an_installed_wheel_serves_the_demo_and_answers(wheel: Path, tmp_path: Path, long: bool) -> None:
    """The environment borrows the packages that inlaid needs; with --long, pip installs them too."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python, command = home / "bin" / "python", home / "bin" / "inlaid"
    pip("install", "--no-compile", *([] if long else ["--no-deps"]), str(wheel), python=python)
    if not long:
        (mine,) = home.glob("lib/python*/site-packages")
        (mine / "borrowed.pth").write_text("\n".join(site.getsitepackages()))  # the clone's own .pth is not read there
    environment = without_the_clone()
    where = "import inlaid; print(inlaid.__file__)"
    found = subprocess.check_output([python, "-c", where], text=True, cwd=tmp_path, env=environment)
    assert Path(found.strip()).is_relative_to(home)
    command_line = [command, "serve", "--port", "0", "--max-model-len", "256", "--num-blocks", "64"]
    server = subprocess.Popen(
        command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
    )
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if at := re.search(r"at:\s+(http://\S+/v1)", line):
                break
        else:
            pytest.fail("the server did not come up:\n" + "".join(said))
        body = {"model": "to_velar", "prompt": "the small chair", "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{at[1]}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert server.returncode == 0
