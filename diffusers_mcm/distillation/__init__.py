"""The paper: motion consistency distillation, from the noise path to the losses of one training step.

It knows tensors and modules, and no file, no repository and no command line.
"""
