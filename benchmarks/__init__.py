"""Measurements, each with its conditions and raw values under ``results/``.

Run them as modules from the root of the repository: ``python -m benchmarks.convert``.
"""
