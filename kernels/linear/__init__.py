"""Products with a weight that stays the same."""
