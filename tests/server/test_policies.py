"""Which replica gets a request, and how other routers' policies went wrong.

Sessions that kept one replica full while others idled (prime-rl#3255), requests without a known prefix sent to whose
cache was smallest however loaded it was (sglang#14305), two choices by loads of five seconds ago (vllm-project/router
#177), conversations known by their first message alone (sglang#26263) or not at all (vllm-project/router#213).
"""

import random
from collections import Counter

import pytest

from minillm.server.policies import (
    CHUNK,
    LONGEST,
    POLICIES,
    LeastLoaded,
    PrefixAware,
    Replica,
    RoundRobin,
    SessionHash,
    Task,
    TwoChoices,
    route_text,
)


def replicas(*loads: int) -> list[Replica]:
    return [Replica(f"r{i}", load) for i, load in enumerate(loads)]


def conversation(*texts: str) -> dict:
    return {"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(texts)]}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_takes_one_of_those_offered(name):
    policy, all_ = POLICIES[name](), replicas(0, 0, 0)
    for i in range(200):
        offered = random.Random(i).sample(all_, i % 3 + 1)
        task = Task("x" * i * 7, f"{i % 5}")
        chosen = policy.choose(offered, task)
        assert chosen in offered
        policy.sent(chosen, task)
        chosen.in_flight += i % 2


def test_round_robin_is_even():
    policy, all_ = RoundRobin(), replicas(9, 0, 0)
    assert Counter(policy.choose(all_, Task()).name for _ in range(30)) == {"r0": 10, "r1": 10, "r2": 10}


@pytest.mark.parametrize("policy", [LeastLoaded(0), PrefixAware(0), SessionHash(0)])
def test_the_least_loaded_and_ties_by_lot(policy):
    assert {policy.choose(replicas(3, 1, 2), Task()).name for _ in range(20)} == {"r1"}
    drawn = Counter(policy.choose(replicas(1, 1, 2), Task()).name for _ in range(400))
    assert set(drawn) == {"r0", "r1"}
    assert min(drawn.values()) > 150


def test_two_choices_never_take_the_fullest_and_spread():
    policy = TwoChoices(0)
    drawn = Counter(policy.choose(replicas(0, 1, 2, 3), Task()).name for _ in range(6000))
    # Of six pairs, r0 is the lesser in three, r1 in two, r2 in one.
    assert drawn["r3"] == 0
    assert [round(drawn[f"r{i}"] / 1000) for i in range(3)] == [3, 2, 1]


def test_what_was_just_sent_counts_beside_what_was_reported():
    """A burst between two reports is shared: vllm-project/router#177 saw all of it on one."""
    for policy in (TwoChoices(0), LeastLoaded(0)):
        all_ = replicas(0, 0)
        all_[1].reported(1)
        for _ in range(9):
            policy.choose(all_, Task()).in_flight += 1
        assert [r.in_flight for r in all_] == [5, 4]


def test_a_report_holds_this_routers_own_requests():
    replica = Replica("r", in_flight=3)
    replica.reported(5)
    assert replica.load == 5
    replica.in_flight = 1
    assert replica.load == 3
    replica.reported(0)  # it has not seen the last one yet
    assert replica.load == 1


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_one_of_n_sessions_moves_when_a_replica_goes():
    policy, all_ = SessionHash(bound=None), replicas(*[0] * 5)
    before = {s: policy.choose(all_, Task("", s)).name for s in map(str, range(2000))}
    after = {s: policy.choose(all_[:-1], Task("", s)).name for s in before}
    moved = [s for s in before if before[s] != after[s]]
    assert {before[s] for s in moved} == {"r4"}
    assert 0.17 < len(moved) / 2000 < 0.23
    assert max(Counter(after[s] for s in moved).values()) < 150  # and to all others, not to one


def test_homes_do_not_depend_on_the_process_or_the_order():
    policy, all_ = SessionHash(), replicas(0, 0, 0, 0)
    homes = [policy.choose(all_, Task("", s)).name for s in "abcdef"]
    assert homes == [SessionHash().choose(all_[::-1], Task("", s)).name for s in "abcdef"]
    assert len(set(homes)) > 1


def test_a_hot_session_overflows_instead_of_pinning_its_home():
    """prime-rl#3255: a saturated engine kept its sessions, while the others idled."""
    loads = {}
    for bound in (None, 1.25):
        policy, all_ = SessionHash(bound=bound), replicas(0, 0, 0, 0)
        for _ in range(100):
            policy.choose(all_, Task("", "hot")).in_flight += 1
        loads[bound] = sorted(r.load for r in all_)
    assert loads[None] == [0, 0, 0, 100]
    assert loads[1.25][-1] <= 32  # ceil(1.25 x 100 / 4)
    assert sum(loads[1.25]) == 100


def test_few_requests_stay_at_home():
    policy, all_ = SessionHash(least=8), replicas(0, 0, 0, 0)
    for _ in range(8):
        policy.choose(all_, Task("", "s")).in_flight += 1
    assert sorted(r.load for r in all_) == [0, 0, 0, 8]


def test_somebody_always_has_room():
    draw = random.Random(0)
    for _ in range(300):
        loads = [draw.choice([0, 7, 8, 9, 100]) for _ in range(draw.randint(1, 6))]
        SessionHash(bound=1.0, least=0).choose(replicas(*loads), Task("", str(loads)))


def test_a_bound_below_the_mean():
    with pytest.raises(ValueError, match="bound: expected at least 1"):
        SessionHash(bound=0.9)


# ---- prefixes --------------------------------------------------------------------------------------------------------


def send(policy: PrefixAware, all_: list[Replica], text: str) -> Replica:
    chosen = policy.choose(all_, Task(text))
    policy.sent(chosen, Task(text))
    return chosen


def test_a_conversation_stays_where_it_lies():
    policy, all_ = PrefixAware(0), replicas(0, 0, 0)
    texts = [f"conversation {i} " * 30 for i in range(20)]
    homes = [send(policy, all_, text) for text in texts]
    assert len({home.name for home in homes}) == 3
    for turn in range(3):
        texts = [text + f"turn {turn} " * 20 for text in texts]
        assert [send(policy, all_, text) for text in texts] == homes


def test_it_moves_when_waiting_costs_more_than_computing():
    policy, all_ = PrefixAware(0, weight=4.0), replicas(0, 0)
    text = "x" * CHUNK * 20
    home = send(policy, all_, text)
    home.in_flight = 4
    assert policy.choose(all_, Task(text)) is home  # 4 x 4 is less than 20 chunks
    home.in_flight = 6
    assert policy.choose(all_, Task(text)) is not home


def test_what_nobody_knows_goes_where_there_is_time():
    """sglang#14305: it went to the smallest cache, which a stuck replica has."""
    policy, all_ = PrefixAware(0), replicas(50, 0)
    for i in range(20):
        policy.sent(all_[1], Task(f"{i}" * 1000))
    assert policy.choose(all_, Task("new" * 1000)) is all_[1]


def test_a_prefix_counts_from_its_start_alone():
    policy, all_ = PrefixAware(0), replicas(0, 0)
    start, rest = "a" * CHUNK, "b" * CHUNK * 5
    policy.sent(all_[0], Task(start + rest))
    policy.sent(all_[1], Task("c" * CHUNK + rest))
    assert {policy.choose(all_, Task(start + rest)).name for _ in range(20)} == {"r0"}
    assert {policy.choose(all_, Task(rest)).name for _ in range(50)} == {"r0", "r1"}


def test_what_is_known_is_bounded_and_ends_are_dropped_first():
    policy, all_ = PrefixAware(0, capacity=10), replicas(0, 0)
    for i in range(50):
        policy.sent(all_[0], Task(chr(65 + i) * CHUNK * 4))
    assert len(policy.known[all_[0]]) == 10
    policy.sent(all_[0], Task("z" * CHUNK * 8))
    policy.sent(all_[0], Task("y" * CHUNK * 4))
    assert policy.choose(all_, Task("z" * CHUNK * 6)) is all_[0]  # six of eight are left
    known = policy.known[all_[0]]
    assert [name in known for name in Task("z" * CHUNK * 8).names] == [True] * 6 + [False] * 2


def test_what_has_gone_is_forgotten():
    policy, all_ = PrefixAware(0), replicas(0, 0)
    text = "x" * CHUNK * 5
    policy.sent(all_[0], Task(text))
    policy.forget(all_[0])
    assert {policy.choose(all_, Task(text)).name for _ in range(20)} == {"r0", "r1"}


def test_long_texts_are_looked_at_in_part():
    assert len(Task("x" * LONGEST * 3).names) == LONGEST // CHUNK
    assert len(route_text({"prompt": "x" * LONGEST * 3})) < LONGEST + 100
    assert len(route_text(conversation(*["x" * 1000] * 1000))) < LONGEST + 2000


def test_the_text_of_a_conversation_is_all_of_it():
    """sglang#26263 took the first message, vllm-project/router#213 none."""
    short, longer = conversation("system", "a"), conversation("system", "a", "b")
    assert route_text(longer).startswith(route_text(short))
    assert route_text(conversation("system", "b")) != route_text(short)
    assert not route_text({**longer, "model": "other"}).startswith(route_text(short))  # adapters share nothing
    assert not route_text({**longer, "cache_salt": "x"}).startswith(route_text(short))
    assert route_text({"prompt": [1, 2]}) != route_text({"prompt": [1, 3]})
