"""Which bank rows are near a query. Knows no labels."""
