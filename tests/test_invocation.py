import sys

import pytest

from repvgg_jax.invocation import command


@pytest.mark.parametrize(
    ("begun", "named"),
    [
        (["train.py", "digits"], ("python train.py", "python fuse.py", "python -m repvgg_jax.predict")),
        (["./checkout/fuse.py"], ("python train.py", "python fuse.py", "python -m repvgg_jax.predict")),
        (
            ["/checkout/repvgg_jax/predict/__main__.py"],
            ("python train.py", "python fuse.py", "python -m repvgg_jax.predict"),
        ),
        (["/venv/bin/repvgg-train"], ("repvgg-train", "repvgg-fuse", "repvgg-predict")),
        (["/venv/lib/ipykernel_launcher.py"], ("repvgg-train", "repvgg-fuse", "repvgg-predict")),
        ([""], ("repvgg-train", "repvgg-fuse", "repvgg-predict")),
        ([], ("repvgg-train", "repvgg-fuse", "repvgg-predict")),
    ],
)
def test_a_command_is_named_as_the_user_has_it(begun, named, monkeypatch):
    monkeypatch.setattr(sys, "argv", begun)
    assert (command("train"), command("fuse"), command("predict")) == named
