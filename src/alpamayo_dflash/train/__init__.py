"""Training of drafts: data, losses, the trainer, and the simulated acceptance length.

The stage is `alpamayo_dflash.train.run.run`; only its config is imported here, because torch is heavy.
"""
