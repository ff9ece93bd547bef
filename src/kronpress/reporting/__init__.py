"""Pages and tables for people, from the content of results.json alone."""

from kronpress.reporting.card import run_story
from kronpress.reporting.comparing import Comparison, compare
from kronpress.reporting.comparison_output import comparison_json, comparison_terminal, write_comparison
from kronpress.reporting.run_report import REPORT, run_report, write_report

__all__ = [
    "REPORT",
    "Comparison",
    "compare",
    "comparison_json",
    "comparison_terminal",
    "run_report",
    "run_story",
    "write_comparison",
    "write_report",
]
