"""Tests with no command's whole run."""
