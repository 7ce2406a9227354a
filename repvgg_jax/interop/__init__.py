"""Ways in and out: PyTorch state dicts, deployable safetensors."""
