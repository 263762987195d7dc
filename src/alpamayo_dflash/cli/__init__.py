"""The command line: parse, build the stage's config, run it."""
