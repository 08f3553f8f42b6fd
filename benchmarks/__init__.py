"""Side-by-side timings: `make bench`, or `python -m benchmarks --only search`."""
