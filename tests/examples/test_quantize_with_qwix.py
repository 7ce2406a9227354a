import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("qwix", reason='pip install -e ".[quantize]"')

from examples.quantize_with_qwix import main, quantize
from repvgg_jax import create_model

SMALL = dict(num_classes=3, depths=(1, 1, 1, 1), width_multiplier=(0.125, 0.125, 0.0625, 0.0625))


def test_every_convolution_and_the_head_compute_in_integers():
    model, images = create_model("repvgg_b1g4", **SMALL, deploy=True), jnp.ones((2, 32, 32, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    quantized, integers = quantize(model, variables, images)
    program = jax.jit(partial(quantized.apply, train=False)).lower(integers, images).as_text()
    operations = [line for line in program.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)", line)]
    assert len(operations) >= len(model.blocks) + 1
    for line in operations:
        assert re.search(r": \(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", line), line


@pytest.mark.long
def test_the_logits_of_a_trained_network_are_those_of_float_to_the_precision_of_8_bits(finished, data_dir, capsys):
    main(finished.workdir / "deploy.safetensors", data_dir)
    printed = capsys.readouterr().out
    found = {name: float(value) for name, value in re.findall(r"^(.+): (\S+) dB", printed, re.MULTILINE)}
    assert found.keys() == {"as trained", "equalized"}
    # Rounding of float32 alone would leave more than 100.
    assert all(20 < each < 60 for each in found.values()), printed
    before, after = map(float, re.search(r"(\S+) MB became (\S+) MB", printed).groups())
    assert after < before / 2
