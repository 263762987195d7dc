"""The arms on the same clips: times, acceptance, losslessness and trajectory error, from held-out clips."""
