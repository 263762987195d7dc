"""Ratios of speed against kept ones."""
