"""What every part may use and that knows no model: artefacts, options, ranks, the machine, progress."""
