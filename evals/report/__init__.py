"""Results to look at: tables for a terminal, pages for a browser, files for a spreadsheet."""

from .page import headline, html_tables, write_report

__all__ = ["headline", "html_tables", "write_report"]
