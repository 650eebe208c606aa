"""The data that every Python has."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from minillm.data import Order, calibration, digits, held_out, orders, reference_text, split_paragraphs, split_topics


def test_digits():
    d = digits()
    assert d.train_x.shape[0] + d.test_x.shape[0] == 1797
    assert d.train_x.shape[1] == 64
    assert d.train_x.dtype == np.float32
    assert (d.train_x.min(), d.train_x.max()) == (0, 1)
    assert set(np.unique(d.train_y)) == set(range(10)) == set(np.unique(d.test_y))
    again, other = digits(), digits(seed=1)
    assert np.array_equal(d.test_x, again.test_x)
    assert not np.array_equal(d.test_x, other.test_x)


def test_reference_text():
    text = reference_text()
    assert list(text) == sorted(text)
    assert sum(map(len, text.values())) > 400_000


def test_topics_are_split_whole():
    train, test = split_topics(held_out=0.1)
    assert not train.keys() & test.keys()
    assert train | test == reference_text()
    share = sum(map(len, test.values())) / sum(map(len, reference_text().values()))
    assert 0.1 <= share < 0.2
    assert split_topics() == split_topics()
    assert split_topics(seed=1) != split_topics()


@pytest.mark.parametrize("share", [0, 1, -0.1, 2])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="held_out: expected a share"):
        split_topics(share)
    with pytest.raises(ValueError, match="test_fraction: expected a share"):
        digits(share)


class Characters:
    """A token is a character: what is in a window can be read."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [-1] * add_special_tokens + [ord(c) for c in text]


def paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n") if part.strip()}


def test_no_paragraph_stands_on_both_sides():
    train, test = split_paragraphs()
    assert not train.keys() & test.keys()
    assert test == split_topics()[1], "held-out topics are whole"
    seen, unseen = (set().union(*map(paragraphs, side.values())) for side in (train, test))
    assert not seen & unseen
    assert seen | unseen == set().union(*map(paragraphs, reference_text().values())), "something was lost"


def test_windows_of_text():
    shown, judged = calibration(Characters(), 6, 900), held_out(Characters(), 4, 700)
    assert (shown.shape, judged.shape) == ((6, 900), (4, 700))
    assert shown.dtype == judged.dtype == torch.int64
    assert min(shown.min(), judged.min()) >= 0, "a special token is in the text"
    assert torch.equal(shown, calibration(Characters(), 6, 900))
    assert torch.equal(judged, held_out(Characters(), 4, 700))
    assert not torch.equal(shown, calibration(Characters(), 6, 900, seed=1))
    assert len({tuple(row) for row in shown.tolist()}) == 6
    assert torch.equal(shown[:3], calibration(Characters(), 3, 900)), "fewer windows are the first of more"


def test_held_out_text_is_in_no_calibration_window():
    def texts(rows):
        return ["".join(map(chr, row)) for row in rows.tolist()]

    everything = calibration(Characters(), 300, 1000)
    train = "\n\n".join(split_paragraphs(0.15)[0].values())
    assert all(text in train for text in texts(everything))
    unseen = {p for text in texts(held_out(Characters(), 40, 1000)) for p in text.split("\n\n")[1:-1] if len(p) > 80}
    shown = "\n".join(texts(everything))
    assert len(unseen) > 30
    assert not [p for p in unseen if p in shown]


def test_more_windows_than_there_are():
    with pytest.raises(ValueError, match="count: expected at most .* windows of 512 tokens, got 10000"):
        calibration(Characters(), 10_000)
    with pytest.raises(ValueError, match="count, length"):
        held_out(Characters(), 0)


def test_orders():
    train, test = orders()
    assert (len(train), len(test)) == (400, 200)
    assert len({order.text for order in train + test}) == 600
    for order in train + test:
        assert list(order.wanted) == ["item", "count", "size", "extras", "to_go"]
        assert order.wanted["item"] in order.text
        assert all(extra in order.text for extra in order.wanted["extras"])
        assert (order.wanted["size"] or "") in order.text
        assert order.wanted["to_go"] == order.text.count(" to go") + order.text.count(" to take away")
        assert order.prompt == f"Order: {order.text}\nJSON:"
        assert order.is_met_by(order.answer)


def pairs(rows: list[Order]) -> set[tuple[str, str]]:
    return {(order.wanted["item"], extra) for order in rows for extra in order.wanted["extras"]}


def test_what_is_held_out_was_not_shown():
    train, test = orders()
    made = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "make_orders.py"))
    openings = [opening.split("{}") for opening in made["NEW_OPENINGS"]]

    def opened(order):
        return any(order.text.startswith(first) and order.text.endswith(last) for first, last in openings)

    assert not any(map(opened, train))
    assert all(map(opened, test))
    shown = pairs(train)
    fresh = [order for order in test if any(pair in made["NEW_PAIRS"] for pair in pairs([order]))]
    assert len(fresh) == 100
    assert not pairs(fresh) & made["NEW_PAIRS"] & shown
    assert not [order for order in train if "macchiato" in order.text or "hazelnut" in order.text]
    assert [order for order in test if "macchiato" in order.text and "hazelnut" not in order.text]


@pytest.mark.parametrize(
    ("output", "met"),
    [
        ('{"item": "mocha", "count": 1, "size": null, "extras": [], "to_go": true}', True),
        ('\n {"to_go":true,"item":"mocha","count":1,"size":null,"extras":[]} ', True),
        ('{"item": "mocha", "count": 1, "size": null, "extras": [], "to_go": 1}', False),
        ('{"item": "mocha", "count": 1, "size": null, "extras": []}', False),
        ('{"item": "mocha", "count": 1, "size": null, "extras": [], "to_go": true} thanks', False),
        ("", False),
    ],
)
def test_an_order_is_met_in_value_and_type(output, met):
    wanted = {"item": "mocha", "count": 1, "size": None, "extras": [], "to_go": True}
    assert Order("One mocha to go.", wanted).is_met_by(output) is met
    assert json.loads(Order("", wanted).answer) == wanted
