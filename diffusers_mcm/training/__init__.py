"""Distillation of a motion consistency model: configuration, the training step, the loop and what it writes."""
