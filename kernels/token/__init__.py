"""A whole decoder, one token at a time, as one kernel."""
