"""Tests, the helpers that they share, and what only developers run."""
