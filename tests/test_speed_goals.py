"""The page of speed's goals: made of the committed results, and judged by the numbers that it shows."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "speed_goals.py"))
PAGE = (ROOT / "docs" / "results" / "speed_goals.md").read_text(encoding="utf-8")


def test_the_page_is_made_of_the_committed_results():
    assert SCRIPT["page"](ROOT / "benchmarks" / "results") == PAGE


def test_without_results_it_says_so(tmp_path):
    page = SCRIPT["page"](tmp_path)
    assert all(f"`{name}` is not measured yet." in page for name in SCRIPT["COMMANDS"])
    assert "met" not in page.split("\n## ")[0].replace("not measured", "")


def test_a_goal_is_met_only_if_the_median_reaches_it():
    header: list[str] = []
    judged = 0
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "goal" in cells:
            header = cells
        elif cells and header and cells[-1] in ("met", "**missed**") and "threads" in header and "B" not in header:
            goal = float(cells[header.index("goal")])
            measured = float(re.match(r"[0-9.]+", cells[header.index("bound") + 1])[0])  # type: ignore[index]
            assert (measured >= goal) == (cells[-1] == "met") or abs(measured - goal) < 0.005
            judged += 1
        elif not cells:
            header = []
    assert judged > 10
