"""The target model: an Alpamayo checkpoint in the official layout, its prompts and its trajectories."""
