"""Networks of other libraries compute the same when merged, and no batch norm is left after a convolution.

`pytest -m long tests/foreign`, and all of the table: `pytest -m "long or slow" tests/foreign`.
"""

import pytest

from benchmarks import foreign

# (library, network) → convolutions, then scales, before and after. What is left are norms that follow no convolution:
# before an activation (DenseNet, ResNet v2), or in front of padding, where the network normalizes its images.
LONG = {
    ("keras", "MobileNetV2"): ((52, 52), (52, 0)),
    ("kimm", "RepVGGA0"): ((44, 22), (62, 1)),
    ("haiku", "ResNet18 v1"): ((20, 20), (20, 0)),
    ("equinox", "ResNet18"): ((20, 20), (40, 0)),
    ("flaxmodels", "ResNet18"): ((20, 20), (21, 1)),
    ("nnx", "ResNet18"): ((20, 20), (20, 0)),
}
SLOW = {
    ("keras", "EfficientNetB0"): ((81, 81), (50, 1)),
    ("keras", "DenseNet121"): ((120, 120), (121, 62)),
    ("keras", "Xception"): ((74, 74), (40, 0)),
    ("keras", "ResNet50V2"): ((53, 53), (49, 17)),
    ("keras", "ResNet50"): ((53, 53), (53, 0)),
    ("keras", "MobileNet"): ((28, 28), (27, 0)),
    ("keras", "MobileNetV3Small"): ((54, 53), (34, 0)),
    ("kimm", "MobileOneS0"): ((191, 43), (227, 1)),
    ("haiku", "ResNet50 v1"): ((53, 53), (53, 0)),
    ("haiku", "ResNet50 v2"): ((53, 53), (49, 17)),
    ("flaxmodels", "ResNet50"): ((53, 53), (54, 1)),
}
MODULES = {"nnx": "flax"}
MARKS = dict.fromkeys(LONG, pytest.mark.long) | dict.fromkeys(SLOW, pytest.mark.slow)
NETWORKS = [pytest.param(*network, marks=mark) for network, mark in MARKS.items()]


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize(("library", "name"), NETWORKS)
def test_a_network_of_another_library_is_merged_and_computes_the_same(library, name, require):
    require(MODULES.get(library, library))
    found = foreign.measure(library, name, side=72 if name == "Xception" else 40)
    convolutions, scales = (LONG | SLOW)[library, name]
    assert found.convolutions == convolutions
    assert (found.before.scales, found.after.scales) == scales
    assert found.after.unfolded == 0
    assert found.before.unfolded > 0  # the count can fail
    assert found.multiply_adds.after <= found.multiply_adds.before
    assert found.error < 1e-5
    assert found.spread > 1e-4  # the images leave a trace in the outputs, larger than the error that is allowed


def test_every_network_of_the_table_is_tested():
    assert {(library, name) for library, (_, names) in foreign.LIBRARIES.items() for name in names} == set(LONG | SLOW)
