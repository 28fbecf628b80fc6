"""Show with auto-gptq itself that its format is ours: it reads what inlaid writes, and inlaid what it writes.

    python third_party/auto_gptq/check.py --auto-gptq PYTHON --out third_party/auto_gptq

PYTHON is the interpreter of an environment that holds auto-gptq; `check.sh` makes one and runs this. For each case the
demo's base is quantized by one of the two, and both say each weight, and the logits for the same tokens. One of
auto-gptq's is served over HTTP too. OUT gets results.json and results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inlaid.checkpoint import Checkpoint, dequantize
from inlaid.engine.request import SamplingParams
from inlaid.llm import LLM
from inlaid.report.provenance import provenance
from inlaid.report.tables import markdown
from perf.gpu.serving import base_name, free_port, stop, wait_ready

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DEMO = ROOT / "models" / "demo"
OURS = (  # bits, group size, flags of `inlaid quantize`
    (4, 128, ["--symmetric"]),
    (4, 32, ["--symmetric", "--act-order"]),
    (4, 32, ["--no-symmetric"]),
    (3, 64, ["--symmetric", "--act-order"]),
    (2, 32, ["--symmetric"]),
    (8, -1, ["--symmetric"]),
)
THEIRS = (  # bits, group size, flags of make_checkpoint.py
    (4, 128, []),
    (4, 32, ["--desc-act"]),
    (4, 32, ["--asymmetric"]),
    (3, 64, ["--desc-act"]),
    (2, 32, []),
    (8, -1, []),
)


def run(command: list[str | Path], **environment: str) -> None:
    """Run a command; its output is shown if it fails."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def quantize(out: Path, bits: int, group: int, flags: list[str]) -> None:
    """Quantize the demo's base with inlaid, quickly: for one task and a few tokens."""
    task = f"maths={DEMO / 'adapters' / 'maths'}:{ROOT / 'data' / 'maths' / 'calibration.jsonl'}"
    order = flags if "--act-order" in flags else [*flags, "--no-act-order"]
    run(
        [
            sys.executable, "-m", "inlaid", "quantize", DEMO / "base", "--out", out, "--bits", str(bits),
            "--group-size", str(group), *order, "--task", task, "--max-tokens", "1024", "--aggregation", "mean",
            "--refine", "0", "--no-clip", "--force",
        ],
        PYTHONPATH=str(ROOT),
    )  # fmt: skip


def compare(checkpoint: Path, answers: Path) -> dict[str, Any]:
    """Compare auto-gptq's weights and logits of a checkpoint with inlaid's."""
    theirs, read = load_file(answers), Checkpoint(checkpoint)
    worst, spread = 0.0, 0.0
    for name, weight in theirs.items():
        if name.startswith("weight/"):
            linear = read.linear(name.removeprefix("weight/"))
            worst = max(worst, float((dequantize(linear, torch.float32) - weight).abs().max()))
            spread = max(spread, float(weight.abs().max()))
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    llm = LLM(str(checkpoint), device="cpu", dtype="float32")
    apart, count = 0.0, 0
    for ids, logits in zip(theirs["ids"].tolist(), theirs["logits"].log_softmax(-1)):
        (answer,) = llm.generate([ids], params, progress=False)
        assert answer.prompt_logprobs is not None
        for place, told in enumerate(answer.prompt_logprobs):
            if told is not None:
                apart = max(apart, abs(told.logprob - float(logits[place - 1, ids[place]])))
                count += 1
    assert bool(theirs["logits"].isfinite().all()), "auto-gptq gives logits that are not finite"
    return {"weights_apart": worst, "largest_weight": spread, "logprobs": count, "logprobs_apart": apart}


def serve(checkpoint: Path) -> dict[str, Any]:
    """Serve a checkpoint over HTTP and compare an answer with that of the engine in this process."""
    prompt = list(range(5, 25))
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    (wanted,) = LLM(str(checkpoint), device="cpu", dtype="float32").generate([prompt], params, progress=False)
    port = free_port()
    command = [sys.executable, "-m", "inlaid", "serve", checkpoint, "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        wait_ready(server, port, 300)
        model = base_name(port)
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = json.loads(answer.read())["choices"][0]["text"]
    finally:
        stop(server)
    return {"text": text, "as_in_process": text == wanted.text}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--auto-gptq", type=Path, required=True, help="an interpreter that can import auto_gptq")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = (
        "import auto_gptq, torch, transformers as t; print(auto_gptq.__version__, torch.__version__, t.__version__)"
    )
    found = subprocess.run([args.auto_gptq, "-c", versions], capture_output=True, text=True, check=True).stdout.split()
    record: dict[str, Any] = {
        **provenance(),
        "auto_gptq": dict(zip(("auto_gptq", "torch", "transformers"), found[-3:])),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for writer, cases in (("inlaid", OURS), ("auto-gptq", THEIRS)):
            for number, (bits, group, flags) in enumerate(cases):
                folder, answers = Path(name) / f"{writer}-{number}", Path(name) / f"{writer}-{number}.safetensors"
                if writer == "inlaid":
                    quantize(folder, bits, group, flags)
                    run([args.auto_gptq, HERE / "load_checkpoint.py", folder, answers], PYTHONPATH="")
                else:
                    sizes: list[str | Path] = ["--bits", str(bits), "--group-size", str(group)]
                    run(
                        [args.auto_gptq, HERE / "make_checkpoint.py", DEMO / "base", folder, answers, *sizes, *flags],
                        PYTHONPATH="",
                    )
                    for file in ("tokenizer.json", "tokenizer_config.json"):
                        shutil.copy(DEMO / "base" / file, folder)
                row = {"written by": writer, "bits": bits, "group": group, "flags": " ".join(flags)}
                rows.append(row | compare(folder, answers))
                print(rows[-1], flush=True)
                if writer == "auto-gptq" and number == 0:
                    record["served"] = serve(folder)
                    print(record["served"], flush=True)
    record["rows"] = rows
    (args.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "results.md").write_text(table(record))
    return 0


def table(record: dict[str, Any]) -> str:
    """Format the record."""
    versions = ", ".join(f"{name} {version}" for name, version in record["auto_gptq"].items())
    lines = [
        [
            row["written by"], str(row["bits"]), "column" if row["group"] == -1 else str(row["group"]),
            row["flags"] or "-", f"{row['weights_apart']:.2g}", f"{row['logprobs_apart']:.2g}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    head = ("written by", "bits", "group", "flags", "weights apart", "log probabilities apart")
    served = "the same text as in process" if record["served"]["as_in_process"] else "another text"
    return (
        "\n".join(
            [
                "# Checkpoints of inlaid and of auto-gptq, each read by both\n",
                f"Made by `bash third_party/auto_gptq/check.sh` at {record['commit']} with {versions},",
                "on a CPU in single precision. Largest differences of a weight, and of 92 log probabilities.\n",
                markdown(head, lines, "lrrlrr"),
                f"\nThe first of auto-gptq's, served by `inlaid serve`: {served}.",
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
