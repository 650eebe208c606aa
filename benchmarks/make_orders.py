"""Write `minillm/texts/orders.jsonl`, the small task that chapter 12 trains adapters on: a spoken order to JSON.

Every text is put together here from lists written for this repository, so the file is under its license and nothing is
downloaded. The held-out orders are made harder to know by heart: none of their openings occurs in training, half of
them have an item with an extra that never stand together there, and one item and one extra are new altogether.

    python benchmarks/make_orders.py
"""

import json
import random
from pathlib import Path

TRAIN, TEST = 400, 200
COUNTS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
SIZES = ("small", "medium", "large")
ITEMS = (
    "latte", "espresso", "cappuccino", "mocha", "americano", "green tea", "black tea", "hot chocolate", "flat white",
    "chai latte",
)  # fmt: skip
EXTRAS = (
    "oat milk", "soy milk", "almond milk", "caramel", "vanilla", "whipped cream", "cinnamon", "honey", "ice", "lemon",
)  # fmt: skip
NEW_ITEM, NEW_EXTRA = "macchiato", "hazelnut syrup"  # in the held-out orders alone
NEW_PAIRS = {(item, EXTRAS[(3 * i + k) % len(EXTRAS)]) for i, item in enumerate(ITEMS) for k in (0, 1)}
TO_GO = (" to go", " to take away")
OPENINGS = (
    "Could I get {}, please?", "I'd like {}.", "{} for me, thanks.", "Can we have {}?", "Hi, {} please.",
    "We'll take {}.", "Please make that {}.", "I will have {} today.", "Hello! {}, if that's okay.",
    "Just {}, thank you.",
)  # fmt: skip
NEW_OPENINGS = (
    "Good morning, my friend wants {}.", "Put me down for {}.", "Is it possible to get {}?", "Let me try {} this time.",
    "Oh, and {} for the table by the window.", "How about {}?", "For my colleague: {}.", "{} - that's all.",
)  # fmt: skip


def plural(name: str) -> str:
    return name + "s"


def order(rng: random.Random, held_out: bool) -> tuple[str, dict[str, object]]:
    """One order as it is spoken, and what is to be written down."""
    word = rng.choice(list(COUNTS))
    size = rng.choice((*SIZES, None))
    items, extras = list(ITEMS), list(EXTRAS)
    if held_out:
        items, extras = [*items, NEW_ITEM], [*extras, NEW_EXTRA]
    item = rng.choice(items)
    chosen = rng.sample(extras, rng.choice((0, 1, 1, 2)))
    to_go = rng.random() < 0.4
    count = COUNTS[word]
    if word == "a" and size is None and item[0] in "ae":
        word = "an"
    said = " ".join(part for part in (word, size, item if count == 1 else plural(item)) if part)
    said += " with " + " and ".join(chosen) if chosen else ""
    said += rng.choice(TO_GO) if to_go else ""
    text = rng.choice(NEW_OPENINGS if held_out else OPENINGS).format(said)
    wanted = {"item": item, "count": count, "size": size, "extras": chosen, "to_go": to_go}
    return text[0].upper() + text[1:], wanted


def is_new(wanted: dict) -> bool:
    """Whether it pairs an item with an extra that never stand together in training."""
    return any((wanted["item"], extra) in NEW_PAIRS for extra in wanted["extras"])


def main() -> None:
    rng = random.Random(12)
    rows: dict[str, dict] = {}
    fresh = 0
    while len(rows) < TRAIN:
        text, wanted = order(rng, held_out=False)
        if not is_new(wanted):
            rows.setdefault(text, {"split": "train", "text": text, "order": wanted})
    while len(rows) < TRAIN + TEST:
        text, wanted = order(rng, held_out=True)
        fresh_wanted = 2 * fresh <= len(rows) - TRAIN  # every other one
        if text not in rows and is_new(wanted) == fresh_wanted:
            rows[text] = {"split": "test", "text": text, "order": wanted}
            fresh += fresh_wanted
    path = Path(__file__).parents[1] / "minillm" / "texts" / "orders.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


if __name__ == "__main__":
    main()
