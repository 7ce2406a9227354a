import re

import pytest

from examples import expand


@pytest.mark.long
def test_the_expand_example_trains_with_branches_and_tests_the_plain_network(capsys, monkeypatch):
    few = tuple(array[: 4 * 128] for array in expand.digits())
    monkeypatch.setattr(expand, "digits", lambda: few)
    expand.main()
    printed = capsys.readouterr().out
    assert "5 of 6 convolutions expanded" in printed
    assert re.search(r"Block_0/Conv_0/kernel +3x3x16x16 +kernel \+ 1x1 \+ identity +batch norm", printed)
    assert float(re.search(r"plain ResNet: (\S+) %", printed)[1]) > 20
