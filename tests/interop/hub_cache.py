"""What an earlier download from the Hugging Face Hub leaves on disk."""

import json

import safetensors.numpy

from repvgg_jax.interop.torch.state_dict import to_state_dict

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# As timm writes it, but for fields that say nothing of the network or its images.
CONFIG = {
    "architecture": "repvgg_a0",
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
}


def write_hub_cache(directory, model, variables, **config):
    """Lay A0 down as huggingface_hub does, so that it takes the files for its own."""
    config_path = write_hub_config(directory, json.dumps({**CONFIG, **config}).encode())
    safetensors.numpy.save_file(to_state_dict(model, variables, "timm"), config_path.with_name("model.safetensors"))


def write_hub_config(directory, content):
    """Lay down the `config.json` alone."""
    repository = directory / "models--timm--repvgg_a0.rvgg_in1k"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_bytes(content)
    return snapshot / "config.json"
