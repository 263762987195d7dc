"""The page in Chromium: tests, pictures and times."""
