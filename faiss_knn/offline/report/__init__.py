"""What an evaluation found, written down: records, tables, text, plots, pages."""
