"""How often a semantic cache gives the answer to another question.

    python benchmarks/semantic_cache.py [--small]

It takes an answer where a question's vector is near enough to that of one answered before. Vectors are SmolLM2's own
mean-pooled hidden states, as they are or with the mean of all taken off. Pairs are written for this: the same question
in other words, and questions that differ in what decides their answer: a number, a name, a direction, a negation.
"""

import sys

import torch
from common import record

from minillm.model.tokenizer_hf import load_tokenizer
from minillm.model.weights import load, model_path

SAME = [
    ("How do I boil an egg?", "What is the way to cook an egg in water?"),
    ("What is the capital of France?", "Which city is France's capital?"),
    ("How can I reset my password?", "I forgot my password, how do I get a new one?"),
    ("When does the shop open on Monday?", "What are the opening hours on Mondays?"),
    ("Translate 'good morning' into Spanish.", "How do you say 'good morning' in Spanish?"),
    ("Why is the sky blue?", "What makes the sky look blue?"),
    ("How far is the moon from the earth?", "What is the distance between the earth and the moon?"),
    ("Who wrote Hamlet?", "Who is the author of Hamlet?"),
    ("What is 15 percent of 80?", "Calculate 15% of 80."),
    ("How do I cancel my subscription?", "I want to end my subscription, what do I do?"),
    ("Is it safe to give dogs chocolate?", "Can dogs eat chocolate?"),
    ("How long does the train from Rome to Milan take?", "What is the travel time by train from Rome to Milan?"),
    ("What is the boiling point of water?", "At which temperature does water boil?"),
    ("Give me a synonym for happy.", "Which word means the same as happy?"),
    ("How many days are in a leap year?", "A leap year has how many days?"),
    ("What does CPU stand for?", "CPU is short for what?"),
    ("How do I sort a list in Python?", "Which Python function sorts a list?"),
    ("Where was Marie Curie born?", "What is Marie Curie's place of birth?"),
    ("How can I make my laptop faster?", "My laptop is slow, what can I do about it?"),
    ("What is the largest planet?", "Which planet is the biggest?"),
]
OTHER = [
    ("What is the capital of France?", "What is the capital of Finland?"),
    ("How do I enable notifications?", "How do I disable notifications?"),
    ("What is 15 percent of 80?", "What is 15 percent of 90?"),
    ("Convert 10 miles to kilometers.", "Convert 10 kilometers to miles."),
    ("Is it safe to take this medicine with food?", "Is it safe to take this medicine without food?"),
    ("When does the shop open on Monday?", "When does the shop close on Monday?"),
    ("Translate 'good morning' into Spanish.", "Translate 'good morning' into Swedish."),
    ("Who won the World Cup in 2010?", "Who won the World Cup in 2014?"),
    ("How long does the train from Rome to Milan take?", "How long does the train from Rome to Naples take?"),
    ("What is the boiling point of water?", "What is the freezing point of water?"),
    ("Give me a synonym for happy.", "Give me an antonym for happy."),
    ("How do I add a user to the group?", "How do I remove a user from the group?"),
    ("Which planet is the largest?", "Which planet is the smallest?"),
    ("Sort the list in ascending order.", "Sort the list in descending order."),
    ("Can I return the shoes after 30 days?", "Can I return the shoes after 60 days?"),
    ("Was Marie Curie born in Poland?", "Was Marie Curie born in Portugal?"),
    ("Write the function in Java.", "Write the function in JavaScript."),
    ("My order has arrived, what do I do?", "My order has not arrived, what do I do?"),
    ("What is the minimum age to vote?", "What is the minimum age to drive?"),
    ("Is the museum open to children?", "Is the museum free for children?"),
]


@torch.inference_mode()
def vectors(texts: list[str], layers: int | None) -> torch.Tensor:
    """The mean of each text's hidden states: [N, hidden], fp32."""
    path = model_path("smollm2-135m-instruct")
    model, tokenizer = load(path, dtype=torch.float32).eval(), load_tokenizer(path)
    if layers:
        model.layers = model.layers[:layers]
    device = next(model.parameters()).device
    found = [model(torch.tensor([tokenizer.encode(text)], device=device))[0].mean(0) for text in texts]
    return torch.stack(found).float().cpu()


def shares(same: torch.Tensor, other: torch.Tensor) -> list[dict[str, float]]:
    """By threshold, one for each similarity of the same questions: the share of them that hits, of other questions that
    hits (each is a wrong answer), and of all hits that is wrong where both are asked equally often.
    """
    rows = []
    for least in sorted(same.tolist(), reverse=True):
        hits, wrong = (same >= least).double().mean().item(), (other >= least).double().mean().item()
        rows.append({"threshold": least, "hits": hits, "wrong": wrong, "wrong of hits": wrong / (wrong + hits)})
    return rows


def main(small: bool) -> dict:
    """-> what is recorded."""
    texts = [text for pair in SAME + OTHER for text in pair]
    raw = vectors(texts, 3 if small else None)
    found: dict = {"same pairs": len(SAME), "other pairs": len(OTHER)}
    for name, states in (("as they are", raw), ("less their mean", raw - raw.mean(0))):
        first, second = torch.nn.functional.normalize(states, dim=1).view(-1, 2, states.shape[1]).unbind(1)
        cosine = (first * second).sum(1)
        same, other = cosine.split([len(SAME), len(OTHER)])
        found[name] = {
            "same, median": same.median().item(), "other, median": other.median().item(),
            "order right": (same[:, None] > other[None]).double().mean().item(), "thresholds": shares(same, other),
        }  # fmt: skip
    return found


if __name__ == "__main__":
    small = "--small" in sys.argv
    results = main(small)
    for name in ("as they are", "less their mean"):
        told = results[name]
        print(name, {k: v for k, v in told.items() if k != "thresholds"})
        print(*told["thresholds"][::4], sep="\n")
    if not small:
        print(record("semantic_cache", results))
