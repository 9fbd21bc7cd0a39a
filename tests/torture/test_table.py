from __future__ import annotations

import json

from tests.torture.line import everything
from tests.torture.table import BEGIN, END, LINES, PAGE, best, control, table


def line(name: str, n: int, **more: object) -> str:
    return json.dumps(
        {"fault": name, "n": n, "acknowledged": 9, "lost": 0, "control": {"lost": 3}, "wrong": [], "missed": [], **more}
    )


def test_the_page_shows_what_the_lines_say() -> None:
    shown = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert shown == table(LINES.read_text()) + "\n", "python -m tests.torture.table writes it anew"


def test_every_fault_has_a_row_and_one_that_was_not_run_says_so() -> None:
    rows = table(line("soak", 5)).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(everything())
    assert sum("| not run |" in row for row in rows) == len(rows) - 1


def test_most_trials_count_and_of_these_the_last_and_too_few_are_told() -> None:
    lines = "\n".join([line("soak", 5, lost=7), line("soak", 50, lost=1), line("soak", 50), line("soak", 6)])
    assert best(lines)["soak"]["n"] == 50
    assert best(lines)["soak"]["lost"] == 0
    (row,) = [row for row in table(lines).splitlines() if "`soak`" in row]
    assert "| 50 of 3,600 | 0 of 9 |" in row


def test_what_was_not_kept_stands_in_the_row() -> None:
    (row,) = [row for row in table(line("soak", 5, missed=["too slow"])).splitlines() if "`soak`" in row]
    assert "| too slow |" in row


def test_a_control_is_a_sentence_or_its_figures() -> None:
    assert control("There is none.") == "There is none."
    assert control({"lost": 3, "share": 0.123456, "wrong": []}) == "lost 3, share 0.123, wrong none"
