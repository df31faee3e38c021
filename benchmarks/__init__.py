"""Benchmarks of VIRGO beside its peers, in one run: `make bench`, or `python -m benchmarks`."""
