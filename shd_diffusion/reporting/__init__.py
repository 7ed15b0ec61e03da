"""Reads result files only and writes them up: one self-contained page, a Markdown table, a terminal table."""

from shd_diffusion.reporting.page import write_report
from shd_diffusion.reporting.table import markdown_table, print_table

__all__ = ["markdown_table", "print_table", "write_report"]
