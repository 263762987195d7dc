"""Scores of target layers over what the target itself writes, and the choice of taps made from them."""
