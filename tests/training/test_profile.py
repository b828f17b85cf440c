"""The profile of a step: a time line that can be opened, and a table that adds up."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from training.profile import StepProfile, no_profile, table


def work(device):
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).relu().sum().backward()


def test_one_step_is_profiled_and_the_others_are_not(tmp_path: Path, device):
    said = []
    profile = StepProfile(tmp_path, device, at_step=2, say=said.append)
    for step in range(4):
        with profile.of(step):
            work(device)
        assert (tmp_path / "profile.txt").exists() == (step >= 2)
    heading, columns, *lines = (tmp_path / "profile.txt").read_text().splitlines()
    assert heading.startswith("step 3: ")
    assert f"{device.type.replace('cuda', 'gpu').upper()} time" in heading
    assert columns.split() == ["ms", "share", "calls", "what"]
    assert any("mm" in line for line in lines)
    milliseconds = [float(line.split()[0]) for line in lines]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(milliseconds) == pytest.approx(float(heading.split()[2]), abs=0.01 * len(lines))
    assert said[0].splitlines()[2:] == lines[:12]
    assert str(tmp_path / "profile.txt") in said[1]


def test_the_time_line_is_one_that_viewers_open(tmp_path: Path, device):
    with StepProfile(tmp_path, device, at_step=0, say=lambda text: None).of(0):
        work(device)
    events = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" and event["dur"] > 0 for event in events)


def test_shares_add_up_and_the_longest_comes_first():
    heading, _, *lines = table({"small": (1.0, 2), "large": (3.0, 4)}, 8.0, "GPU")
    assert heading == "4.00 ms of GPU time in 8.00 ms"
    assert [line.split() for line in lines] == [["3.000", "75.0%", "4", "large"], ["1.000", "25.0%", "2", "small"]]


def test_no_profile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with no_profile().of(0):
        work("cpu")
    assert list(tmp_path.iterdir()) == []
