"""schemathesis over /openapi.json with all of its checks: what the document allows is accepted, what it forbids is
refused, and every answer has the form that it gives. `LISTED` holds what a schema cannot say: relations between fields,
the context's length, 5.0 for 5 where decoding is strict, the chat template's own rules, and features that are named and
refused. The long form needs more time than a test has: `pytest --long --timeout 7200 tests/chaos/test_openapi.py`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.server.live import ADMIN_KEY, DEMO, Live, serving

LISTED = re.compile(
    "give either|exclude each other|must equal n|is above max_tokens|unknown fields|not supported|not served|is empty|"
    "read text only|unknown role|the chat template refuses|0 only with|must be a text, a list|the vocabulary has|"
    "context|with max_model_len|tokens can hold|cannot be false|"
    "entries for|within the prompt|not valid JSON|the grammar is|same name|has no role|there are no tools|"
    "got `float`|one engine|unknown policy|limits: |"
    "has no name|has no id|needs json_schema|only one constraint|cannot bring|"
    "half a character|did you mean|is not a reference|is not a name"
)
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Run a server with a short context, so that answers without a limit are short too."""
    flags = [str(DEMO / "base"), "--served-model-name", "demo", "--max-model-len", "64", "--max-prompts", "4"]
    runtime = ["--allow-runtime-lora", "--admin-key", ADMIN_KEY, "--lora-root", str(tmp_path_factory.mktemp("root"))]
    with serving(*flags, *runtime, "--log-level", "error", "--adapter-timeout", "1") as live:
        yield live


@pytest.mark.filterwarnings("ignore")  # of schemathesis and what it stands on
def test_the_api_is_what_its_description_says(small: Live, long: bool, tmp_path: Path) -> None:
    schemathesis: Any = importlib.import_module("schemathesis")
    failures: Any = importlib.import_module("schemathesis.core.failures")
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    found: list[str] = []
    settings = hypothesis.settings(
        max_examples=100 if long else 1,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    num_answers = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if "profile" in operation.path:
            continue  # profiling slows every later answer down
        for mode in schemathesis.GenerationMode:

            @settings
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                nonlocal num_answers
                response = case.call(headers=ADMIN)
                num_answers += 1
                try:
                    case.validate_response(response)
                except failures.FailureGroup as error:
                    for reason in error.exceptions:
                        kind = type(reason).__name__
                        if kind == "AcceptedNegativeData" and "(was Authorization)" in str(reason):
                            continue  # the header that it leaves out is the one that `call` adds
                        rejected = kind == "RejectedPositiveData" and response.status_code == 400
                        if not (rejected and LISTED.search(response.text)):
                            found.append(
                                f"{case.method} {case.path}: {reason}\n{response.text[:500]}\n{case.body!r:.1000}"
                            )

            with suppress(hypothesis.errors.Unsatisfiable):  # nothing about this operation can be wrong
                check()
    if found:
        pytest.fail("\n\n".join(found), pytrace=False)
    assert num_answers > 40
