"""`report.html`: one page about a run that needs no other file."""

from tiphys.launch.report.page import write_report

__all__ = ["write_report"]
