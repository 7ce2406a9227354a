"""Networks and weights in other formats: PyTorch, safetensors, ONNX, StableHLO, Flax NNX and the Hugging Face Hub."""
