"""Tests beside another's package, in an environment with it."""
