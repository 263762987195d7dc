"""Tables, plots and a page, from a stage's JSON alone; nothing here loads a model."""
