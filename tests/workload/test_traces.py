"""Published trace formats, their time scale, window and loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlaid.workload.traces import Trace, read_trace, repeat_rows, trace_period


def saved(tmp_path: Path, text: str, name: str = "trace") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,0,3
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01.509930+00:00,2399,6
2024-05-10 00:00:02+00:00,10,1
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,0,1087,API log
118,GPT-4,417,276,693,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 3000, "input_length": 700, "output_length": 26, "hash_ids": [46, 9]}
"""
VTC = json.dumps(
    [
        {"model": "vicuna", "conversation": [{"content": "b c"}, {"content": "d"}], "tstamp": 20.5},
        {"model": "koala", "conversation": [{"content": "a"}, {"content": "e f"}], "tstamp": 10.0},
    ]
)


def test_azure_2023(tmp_path: Path) -> None:
    rows = read_trace(Trace(saved(tmp_path, AZURE_2023)))
    assert [row.at for row in rows] == pytest.approx([0, 4.314579, 60])
    assert [(row.input_length, row.output_length) for row in rows] == [(374, 44), (396, 109), (1, 3)]


def test_azure_2024(tmp_path: Path) -> None:
    rows = read_trace(Trace(saved(tmp_path, AZURE_2024)))
    assert [row.at for row in rows] == pytest.approx([0, 1.5, 1.99007])


def test_burstgpt_leaves_out_failed_requests(tmp_path: Path) -> None:
    rows = read_trace(Trace(saved(tmp_path, BURSTGPT)))
    assert [(row.at, row.adapter, row.output_length) for row in rows] == [(0, "ChatGPT", 18), (113, "GPT-4", 276)]


def test_mooncake_keeps_its_blocks(tmp_path: Path) -> None:
    rows = read_trace(Trace(saved(tmp_path, MOONCAKE)))
    assert [(row.at, row.blocks) for row in rows] == [(0, (46, 47)), (3, (46, 9))]


def test_vtc_is_sorted_by_time(tmp_path: Path) -> None:
    rows = read_trace(Trace(saved(tmp_path, VTC)))
    assert [(row.at, row.adapter, row.prompt, row.completion) for row in rows] == [
        (0, "koala", "a", "e f"),
        (10.5, "vicuna", "b c", "d"),
    ]


def test_prompts_and_sharegpt_have_no_times(tmp_path: Path) -> None:
    own = read_trace(Trace(saved(tmp_path, '{"prompt": "p", "completion": "c", "adapter": "x"}\n')))
    assert (own[0].at, own[0].prompt, own[0].adapter) == (None, "p", "x")
    shared = json.dumps([{"conversations": [{"value": "q"}, {"value": "r"}]}, {"conversations": []}])
    assert [row.prompt for row in read_trace(Trace(saved(tmp_path, shared)))] == ["q"]


def test_an_adapter_column_is_read(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens,adapter\n2023-11-16 18:15:46,3,4,sql\n"
    assert read_trace(Trace(saved(tmp_path, text)))[0].adapter == "sql"


def test_window_scale_and_truncation(tmp_path: Path) -> None:
    path = saved(tmp_path, AZURE_2023)
    rows = read_trace(Trace(path, window=(4, 60), time_scale=0.5, max_input=100, max_output=50))
    assert [(row.at, row.input_length, row.output_length) for row in rows] == [(pytest.approx(0.1572895), 100, 50)]


def test_loop_repeats_one_period_later(tmp_path: Path) -> None:
    spec = Trace(saved(tmp_path, MOONCAKE), loop=True, window=(0, 5))
    rows = read_trace(spec)
    assert [row.at for row in repeat_rows(rows, 12, None, trace_period(spec, rows))] == [0, 3, 5, 8, 10]
    assert len(repeat_rows(rows, None, 7, 5.0)) == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what,is\nthis,1\n", "unknown trace format"),
        ("TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,3\n", "not a valid auto file"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,4\n", "invalid literal"),
        ('{"timestamp": 0, "input', "not a valid"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3,1\n2023-11-16 18:15:40,3,1\n", "earlier"),
    ],
)
def test_broken_files_are_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_trace(Trace(saved(tmp_path, text)))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset /no/such\.csv does not exist"):
        read_trace(Trace("/no/such.csv"))


def test_lines_of_tenants_are_sorted_and_name_themselves(tmp_path: Path) -> None:
    rows = read_trace(Trace(saved(tmp_path, '[5.0, "bob", 7, 3]\n[4.0, "eve", 9, 2]\n')))
    assert [(row.at, row.tenant, row.input_length, row.output_length) for row in rows] == [
        (0, "eve", 9, 2),
        (1, "bob", 7, 3),
    ]
    with pytest.raises(ValueError, match="line 2: seconds must be >= 0"):
        read_trace(Trace(saved(tmp_path, '[5.0, "bob", 7, 3]\n[4.0, "eve", 0, 2]\n')))
