"""`report.html`: one self-contained page of a run."""

from tiphys.launch.report.page import write_report

__all__ = ["write_report"]
