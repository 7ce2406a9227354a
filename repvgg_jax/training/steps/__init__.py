"""What the devices do: the training step with all it is made of, and the evaluation step."""
