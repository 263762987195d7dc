"""Distillation data: rollouts of the target, kept as sampled token ids, tapped states and top-k logits."""
