"""The page of a run, or of several side by side: one HTML file that needs no network."""
