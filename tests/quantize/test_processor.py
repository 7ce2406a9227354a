"""Which processors need a bit of room in products of 8 bits."""

from pathlib import Path

import pytest

from repvgg_jax.quantize import processor, saturates


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "flags : sse avx2", True),
        ("x86_64", "flags : avx512f avx512_vnni", False),
        ("AMD64", "flags : avx2 avx_vnni", False),
        ("x86_64", None, True),
        ("aarch64", "Features : fp asimd", False),
    ],
)
def test_products_saturate_on_x86_without_vnni(machine, flags, expected, monkeypatch):
    def read_text(self):
        if flags is None:
            raise FileNotFoundError
        return flags

    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert saturates() == expected
