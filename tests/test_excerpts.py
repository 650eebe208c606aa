"""A record's parts may lie in several devices' files."""

import json

import pytest

from minillm.learn import excerpts


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(excerpts, "root", lambda: tmp_path)

    def write(device, results):
        path = tmp_path / "benchmarks" / "results" / device / "suite.json"
        path.parent.mkdir(parents=True)
        said = {"date": "2026-01-01", "device": device.upper(), "versions": {"torch": "2"}}
        path.write_text(json.dumps({"provenance": said, "results": results}))

    return write


def test_a_part_is_the_first_devices_that_has_it(records):
    records("h100", {"a": 1})
    records("h200", {"a": 2, "b": 3})
    records("cpu-2-cores", {"a": 4, "b": 5, "c": 6})
    assert excerpts.results("suite", "h100", "h200") == {"a": 1, "b": 3}
    assert excerpts.results("suite", "h200", "h100") == {"a": 2, "b": 3}
    assert excerpts.results("suite") == {"a": 4, "b": 5, "c": 6}
    lines = excerpts.provenance("suite", "h100", "h200", "cpu-2-cores").split("\n\n")
    assert [(line.split(" on ")[1].split(";")[0], line.rpartition(") of ")[2]) for line in lines] == [
        ("H100", "a.*"),
        ("H200", "b.*"),
        ("CPU-2-CORES", "c.*"),
    ]


def test_who_has_nothing_to_give_is_not_named(records):
    records("h100", {"a": 1})
    records("h200", {"a": 2})
    assert excerpts.provenance("suite", "h100", "h200", "b200").count("Measured") == 1
    assert " of a" not in excerpts.provenance("suite", "h100", "h200")


def test_what_nobody_recorded(records):
    with pytest.raises(FileNotFoundError, match=r"h100/suite.json: not recorded yet"):
        excerpts.results("suite", "h100", "h200")
    with pytest.raises(FileNotFoundError, match="not recorded yet"):
        excerpts.provenance("suite", "h100", "h200")
