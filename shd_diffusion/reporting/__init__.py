"""Writes up what runs left, one self-contained page and a table on the terminal; and contact sheets of data."""

from shd_diffusion.reporting.metrics_table import print_table
from shd_diffusion.reporting.page import write_report

__all__ = ["print_table", "write_report"]
