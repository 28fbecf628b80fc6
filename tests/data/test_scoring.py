"""The judges, at their edges."""

from __future__ import annotations

from data.scoring import exact_match, final_number, pass_at_1, score


def test_exact_match_forgives_only_surrounding_space() -> None:
    example = {"completion": "gra ko."}
    assert exact_match(" gra ko.\n", example) == 1.0
    assert exact_match("gra ko", example) == exact_match("gra  ko.", example) == 0.0


def test_final_number_reads_the_last_one() -> None:
    assert final_number("2 + 3 = 5. Anna has 5 hens.", {"answer": 5}) == 1.0
    assert final_number("5, no, 6", {"answer": 5}) == final_number("none", {"answer": 5}) == 0.0
    assert final_number("-5", {"answer": 5}) == 0.0


def test_pass_at_1_runs_any_program_that_does_it() -> None:
    example = {"completion": "sum(x)", "cases": [[[1, 2], 3], [[5], 5]]}
    assert pass_at_1("sum([v + 0 for v in x])", example) == 1.0
    assert pass_at_1("len(x)", example) == pass_at_1("not code", example) == 0.0
    assert pass_at_1("x[0] == x[0]", {"cases": [[[1], 1]]}) == 0.0


def test_score_is_a_mean_in_points() -> None:
    assert score("exact_match", ["a", "b"], [{"completion": "a"}, {"completion": "c"}]) == 50.0
