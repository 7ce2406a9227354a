import re

from examples import resnet


def test_the_resnet_example_prints_what_was_merged_and_the_difference(capsys, monkeypatch):
    small = resnet.ResNet(depths=(1, 1), width=4, num_classes=3)
    monkeypatch.setattr(resnet, "ResNet", lambda: small)
    resnet.main()
    printed = capsys.readouterr().out
    assert re.search(r"convolutions +6 +6", printed)
    assert float(re.search(r"difference: (\S+) of", printed)[1]) < 1e-5
