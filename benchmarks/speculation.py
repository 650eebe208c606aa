"""Texts for measurements of speculation: what is asked of a model, made from lists of words by a seed.

Three tasks, from much repetition to none: "copy-edit" (a passage with mistakes is to be written again), "summary" (of a
passage), "story" (about somebody somewhere). `training_prompts` asks for these and for more, to learn a draft head by.
Words and sentences lie on two sides that share nothing, one for training and one for measuring.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm import LLM
from minillm.files import cache_dir

__all__ = ["MODEL", "TASKS", "asked", "chat", "head_folder", "passage", "training_prompts"]

MODEL = "smollm2-135m-instruct"

NAMES = ("Ada", "Bruno", "Clara", "David", "Elif", "Farid", "Greta", "Hugo", "Irma", "Jonas", "Kira", "Leon", "Mina",
         "Noor", "Oskar", "Paula", "Quentin", "Rosa", "Samir", "Tilda", "Umar", "Vera", "Wanda", "Yusuf")  # fmt: skip
WHO = ("a retired teacher", "a young baker", "a train driver", "a lonely lighthouse keeper", "a curious robot",
       "a street musician", "a shy librarian", "a clever fox", "an old fisherman", "a night nurse", "a clock maker",
       "a mountain guide", "a forgetful wizard", "a school cook", "a brave mouse", "a tired astronaut")  # fmt: skip
PLACES = ("the harbor", "the old library", "a small village", "the night market", "the botanical garden",
          "the railway station", "a mountain hut", "the city museum", "a quiet island", "the town hall",
          "a busy airport", "the school yard", "a desert camp", "the river bank", "a deep forest",
          "the flower shop")  # fmt: skip
EVENTS = ("finds a letter that was never sent", "loses the key to an important door", "hears a song from long ago",
          "meets a stranger who knows their name", "must choose between two friends", "builds a boat out of scrap",
          "discovers a map under the floor", "saves a bird in a storm", "wins a prize by mistake",
          "learns to bake bread", "wakes up a hundred years later", "repairs an ancient machine",
          "keeps a secret for too long", "gets lost on the way home", "plants a tree in the wrong place",
          "teaches a child to swim")  # fmt: skip
TOPICS = ("how rain forms", "why leaves change color", "what a budget is", "how vaccines work",
          "how a bicycle stays up",
          "why the sky is blue", "what photosynthesis is", "how the internet works", "why we sleep", "what gravity is",
          "how bread rises", "what a black hole is", "how bees find flowers", "why the sea is salty",
          "how a battery stores energy", "what inflation means", "how to learn a language", "why exercise is healthy",
          "how to write a good letter", "what democracy is", "how earthquakes happen", "what a computer program is",
          "how to save water at home", "why reading matters")  # fmt: skip
AUDIENCES = ("a child of eight", "a busy manager", "a student", "my grandmother", "a new colleague", "a friend")
SENTENCES = (
    "{name} opened a small {shop} near {place} in {year}, and {n} people came on the first day.",
    "The council decided on {day} to repair {place}, which will cost {n} thousand euros and take {m} months.",
    "Since {year} the {shop} has been run by {name}, who learned the trade from an uncle.",
    "According to {name}, the work at {place} went well, although it rained for {m} days.",
    "On {day} morning {n} visitors stood in front of {place} and waited for the doors to open.",
    "A new bus connects {place} with the center every {m} minutes, and it is free for children.",
    "{name} said that the most difficult part was to find {m} helpers who had time on {day}.",
    "Last year {n} tons of paper were collected at {place}, more than ever before.",
    "The {shop} sells bread, cheese and {m} kinds of tea, and it is closed on {day}.",
    "In {year} a storm damaged the roof of {place}, and {name} paid for the repair.",
    "Many neighbors like the plan, but {name} is afraid that it will be loud on {day} evenings.",
    "The team of {m} volunteers meets at {place} every {day} and plans what comes next.",
    "{name} remembers that {place} had only {n} seats when the {shop} moved there in {year}.",
    "After {m} weeks the first results were shown to {n} guests at {place}.",
)
SHOPS = ("bakery", "bookshop", "workshop", "cafe", "print shop", "tailor shop", "bike store", "tea house")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
OTHERS = (
    "Explain {topic} to {audience}.", "Write a short poem about {place}.", "List five facts about {topic}.",
    "Write an email from {name} to {audience} about {topic}.", "What should somebody know about {topic}?",
    "Write a short play about {name} and {who}.", "Give me a plan for a day at {place}.",
    "Describe {who} in a few sentences.", "Compare {place} and {place} in a table.", "Write step by step {topic}.",
)  # fmt: skip
TASKS = ("copy-edit", "summary", "story")


class Side:
    """Words of one side. `training`: those in even places of each list, else the others."""

    def __init__(self, training: bool, seed: int) -> None:
        self.rng, self.first = random.Random(2 * seed + training), 0 if training else 1

    def one(self, words: Sequence[str]) -> str:
        return self.rng.choice(words[self.first :: 2])

    def filled(self, sentence: str) -> str:
        """Each {word} of a sentence replaced, each time anew."""
        words: dict[str, Any] = {
            "name": NAMES, "who": WHO, "place": PLACES, "topic": TOPICS, "audience": AUDIENCES, "shop": SHOPS,
            "day": DAYS, "year": [str(year) for year in range(1950, 2024)],
            "n": [str(n) for n in range(20, 900, 7)], "m": [str(n) for n in range(2, 40)],
        }  # fmt: skip
        for key, values in words.items():
            while "{" + key + "}" in sentence:
                sentence = sentence.replace("{" + key + "}", self.one(values), 1)
        return sentence


def passage(side: Side, sentences: int = 7) -> str:
    """A few sentences of town news."""
    chosen = side.rng.sample(SENTENCES[side.first :: 2], min(sentences, len(SENTENCES) // 2))
    return " ".join(side.filled(sentence) for sentence in chosen)


def misspelled(text: str, rng: random.Random, share: float = 0.06) -> str:
    """Letters of some longer words in the wrong order."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 4 and word.isalpha() and rng.random() < share:
            at = rng.randrange(1, len(word) - 2)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _asked(task: str, side: Side) -> str:
    if task == "copy-edit":
        text = misspelled(passage(side), side.rng)
        return f"Correct the spelling mistakes in this text. Write the whole text again, change nothing else.\n\n{text}"
    if task == "summary":
        return f"Summarize this text in three sentences.\n\n{passage(side)}"
    return side.filled("Write a story about {name}, {who} at {place} who ") + side.one(EVENTS) + "."


def asked(task: str, count: int, seed: int = 0) -> list[str]:
    """What a user asks, in `count` ways, of the side to measure by."""
    side = Side(training=False, seed=seed)
    return [_asked(task, side) for _ in range(count)]


def training_prompts(count: int, seed: int = 0) -> list[str]:
    """Of the other side: an eighth each of the tasks that copy, three of stories, three of other things."""
    side, found = Side(training=True, seed=seed), []
    for i in range(count):
        kind = i % 8
        if kind < 5:
            found.append(_asked(("copy-edit", "summary", "story", "story", "story")[kind], side))
        else:
            found.append(side.filled(side.rng.choice(OTHERS)))
    return found


def chat(llm: LLM, texts: Sequence[str]) -> list[list[int]]:
    """Prompts: each text as what a user says first."""
    return [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]


def head_folder() -> Path:
    """Where draft_head.py leaves its head, and other measurements find it."""
    return cache_dir() / f"draft-head-{MODEL}"
