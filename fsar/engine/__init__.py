"""Training, evaluation, checkpoints and what they need: devices, processes, optimisers."""
