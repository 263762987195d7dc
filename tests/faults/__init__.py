"""What breaks things on purpose: kills and fuzzing."""
