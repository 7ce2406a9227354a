"""A competitor that takes too long is reported, not waited for, and takes nobody with it."""

import time

import pytest

from benchmarks import race
from benchmarks.race import Case, Race
from benchmarks.speed import row

# Plays PyTorch: what it does is the name of the network, by layout or in every one.
PEER = """
import time

def build(case, layout):
    doings = dict(part.split(" ") for part in case.network.split(","))
    doing = doings.get(layout.split(" ")[0]) or doings["both"]
    if doing == "hangs":
        time.sleep(600)
    count = [0]

    def calls(number):
        count[0] += number
        if doing == "later" and count[0] > 4:
            time.sleep(600)
        time.sleep(number * (0.1 if doing == "slow" else 0.01))

    return calls
"""
LIMIT = 2  # seconds


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "sleeping_peer.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(race, "PEERS", {"pytorch-eager": "sleeping_peer"})
    monkeypatch.setattr(race, "LAYOUTS", {"sleeping_peer": ("channels last", "contiguous")})

    def run(*networks, turns=1, on_gpu=False):
        cases = [Case("pytorch-eager", network, "step", 1) for network in networks]
        start = time.monotonic()
        with Race(on_gpu, LIMIT) as contest:
            times = contest.run(cases, turns, seconds=0.01)
        assert time.monotonic() - start < 300
        return times

    return run


def test_the_faster_layout_races(run):
    first, second = run("channels slow,contiguous fast", "channels fast,contiguous slow")
    assert (first.layout, second.layout) == ("contiguous", "channels last")
    assert max(*first.seconds, *second.seconds) < 0.1
    assert row(first, first)[1] == "pytorch-eager, contiguous"


class Scripted:
    """In place of a competitor's process: "channels last" of the network "half" hangs, and all of "hangs"."""

    def __init__(self, module, stopped):
        self.ended, self.prepared = False, set()

    def ask(self, limit, **request):
        if "forget" in request:
            self.prepared.clear()
            return {}
        asked = "run" if "run" in request else "prepare"
        network, layout = request[asked]["case"]["network"], request[asked]["layout"]
        if network == "hangs" or (network, layout) == ("half", "channels last") or (network, asked) == ("later", "run"):
            self.ended = True
            return {"error": f"over {limit:g} s"}
        if asked == "prepare":
            self.prepared.add((network, layout))
            return {"call": 0.01}
        assert (network, layout) in self.prepared, "it went with the process, and was not prepared again"
        return {"seconds": 0.01}

    def close(self):
        assert self.ended


def test_what_hangs_is_named_and_what_was_prepared_before_races_on(monkeypatch):
    monkeypatch.setattr(race, "_Worker", Scripted)
    monkeypatch.setattr(race, "PEERS", {"pytorch-eager": "peer"})
    monkeypatch.setattr(race, "LAYOUTS", {"peer": ("channels last", "contiguous")})
    cases = [Case("pytorch-eager", network, "step", 1) for network in ("whole", "half", "hangs", "later", "after")]
    whole, half, hangs, later, after = Race(on_gpu=False, limit=LIMIT).run(cases, turns=2, seconds=0.01)
    assert half.layout == f"contiguous (channels last over {LIMIT} s)"
    assert hangs.error == later.error == f"over {LIMIT} s"
    assert hangs.seconds == later.seconds == ()
    assert row(whole, hangs)[2:] == ["-", "-", f"over {LIMIT} s"]
    assert [len(each.seconds) for each in (whole, half, after)] == [2, 2, 2]


@pytest.mark.parametrize(
    ("command", "answer"),
    [("exec sleep 600", {"error": "over 0.3 s"}), ("exit 3", {"error": "the process ended with status 3"})],
)
def test_a_process_that_does_not_answer_in_time_is_killed(command, answer, tmp_path, monkeypatch):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{command}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(race.sys, "executable", str(tmp_path / "python"))
    worker = race._Worker("peer", stopped=True)
    try:
        assert worker.ask(0.3, forget=True) == answer
        assert worker.ended
    finally:
        worker.close()


@pytest.mark.long
def test_a_layout_that_hangs_is_named_and_the_other_races_beside_what_was_prepared_before(run):
    before, hanging = run("both fast", "channels hangs,contiguous fast", turns=2)
    assert hanging.layout == f"contiguous (channels last over {LIMIT} s)"
    assert len(before.seconds) == len(hanging.seconds) == 2


@pytest.mark.long
def test_what_hangs_in_every_layout_or_in_its_turn_is_reported_as_over_the_limit(run):
    hanging, later, beside = run("both hangs", "both later", "both fast", turns=2)
    assert hanging.error == later.error == f"over {LIMIT} s"
    assert hanging.seconds == later.seconds == ()
    assert row(beside, hanging)[2:] == ["-", "-", f"over {LIMIT} s"]
    assert len(beside.seconds) == 2


def test_on_a_gpu_the_first_layout_is_the_only_one(run):
    (only,) = run("channels slow,contiguous fast", on_gpu=True)
    assert only.layout == "channels last"
