"""One question per file, each run as `python -m lensc.bench.<name>`; `record` writes the results as data."""
