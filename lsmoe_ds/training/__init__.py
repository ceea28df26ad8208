"""The training loop, schedules, losses and checkpoints."""
