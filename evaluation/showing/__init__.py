"""Presentation of records: tables, plots, reports, model cards."""
