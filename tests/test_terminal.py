import os

import pytest

from repvgg_jax.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Katze, 猫, кот, 👩‍🔬", "Katze, 猫, кот, 👩‍🔬"),
        ("cat\x1b[2J", r"cat\x1b[2J"),
        ("cat\n  99.00 %  dog", r"cat\n  99.00 %  dog"),
        ("cat\r\tdog\x7f\x9b", r"cat\r\tdog\x7f\x9b"),
        ("cat\u2028dog", r"cat\u2028dog"),
        ("cat\u202egnp.exe", r"cat\u202egnp.exe"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped_and_all_else_is_kept(text, shown):
    assert printable(text) == shown
