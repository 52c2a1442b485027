"""Reports of runs: one HTML file that needs nothing else, and the figures in it.

`write` takes records, which come from result files or from a grower.
"""

from meristem.report.page import write
from meristem.report.records import Point, Record, of_files

__all__ = ["Point", "Record", "of_files", "write"]
