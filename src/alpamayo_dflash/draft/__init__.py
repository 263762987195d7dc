"""The draft network: its config, weights, masks and file formats."""
