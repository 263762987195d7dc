"""Tests on a small target, and of whole commands."""
