"""Checkpoint files: guarded reading, staged and resumable writing, provenance."""
