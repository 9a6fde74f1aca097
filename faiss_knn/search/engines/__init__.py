"""How neighbours are found: each engine, how it is chosen, and what they share."""
