"""Training of drafts: data, losses, the trainer, the simulated and the expected acceptance length.

The stage is `alpamayo_dflash.train.run.run`; only its config is imported here, because torch is heavy.
"""
