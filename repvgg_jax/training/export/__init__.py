"""Files of other formats made of a `deploy.safetensors`, each proven on images in its own runtime."""
