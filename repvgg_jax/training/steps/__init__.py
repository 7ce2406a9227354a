"""The steps that the devices compute: the training step with all its parts, and the evaluation step."""
