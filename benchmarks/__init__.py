"""The measuring instrument of this project: ``python -m benchmarks --help``, run from the root of a checkout.

How to read what it prints, and what is fair about it and why, is in ``docs/benchmarks.md``.
"""
