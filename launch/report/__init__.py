"""`report.html`: one page about a run, or about several, that needs no other file."""

from tiphys.launch.report.compare import write_comparison
from tiphys.launch.report.page import write_report

__all__ = ["write_comparison", "write_report"]
