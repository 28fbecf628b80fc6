"""The files of deploy/ name what is there: sources that the images copy, flags that `inlaid serve` takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from inlaid import cli

ROOT = Path(__file__).parents[1]
IMAGES = ("Dockerfile", "Dockerfile.cuda")


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_copies_what_is_there_and_what_the_context_holds(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    copied = [source for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for source in line.split()[:-1]]
    assert {"setup.py", "inlaid", "models/demo"} <= set(copied)
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert [source for source in copied if not (ROOT / source).exists() or source not in context] == []


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_starts_a_server_that_takes_flags(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.M)
    command, *arguments = json.loads(entry)
    assert command == "inlaid"
    args = cli.parse([*arguments, "/models/base", "--adapter", "a=/models/a"])
    assert (args.host, args.port, args.model) == ("0.0.0.0", 8000, "/models/base")
    assert "http://127.0.0.1:8000/health" in text


def test_the_unit_starts_a_server_and_systemd_reads_it(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "inlaid.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.+)$", text, re.M)
    (flags,) = re.findall(r"^#   INLAID_FLAGS=(.+)$", text, re.M)
    for given in ("", flags):
        _, *arguments = shlex.split(line.replace("$INLAID_FLAGS", given))
        assert cli.parse(arguments).state == "/var/lib/inlaid/state.json"
    if shutil.which("systemd-analyze"):
        unit = tmp_path / "inlaid.service"
        unit.write_text(text.replace("/opt/inlaid/bin/inlaid", "/bin/true"))
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_kuberay_manifest_is_whole_and_its_front_takes_its_flags() -> None:
    cluster, front, service = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
    assert [each["kind"] for each in (cluster, front, service)] == ["RayCluster", "Deployment", "Service"]
    group = cluster["spec"]["workerGroupSpecs"][0]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (container,) = front["spec"]["template"]["spec"]["containers"]
    _, command, *arguments = shlex.split(container["args"][0].partition("exec ")[2])
    args = cli.parse([command, *arguments])
    assert args.replicas == (group["minReplicas"], group["maxReplicas"])
    assert args.ray_address == "auto"
    assert service["spec"]["selector"] == front["spec"]["template"]["metadata"]["labels"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {f"/{args.model.split('/')[1]}"} == mounts
