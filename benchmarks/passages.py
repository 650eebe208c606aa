"""Short texts, and three tasks on them that repeat their prompt a lot, a little and not at all. Written for this
repository; chapter 14's measurement asks for a copy with its spelling corrected, a summary, and a story. `practice`:
other prompts of these kinds and of others, to train a draft head on.
"""

import random
from collections.abc import Callable, Iterator

from minillm.data import split_paragraphs

__all__ = ["PASSAGES", "TASKS", "messages", "misspelled", "practice"]

PASSAGES = {
    "the library": [
        "The library on Mill Street opens at nine in the morning and closes when the last reader has gone home.",
        "Its oldest book is a ship's log from 1742, which nobody may touch without cotton gloves.",
        "Children borrow up to ten books for three weeks, and adults as many as they can carry.",
        "On Thursdays a retired teacher reads aloud in the garden, weather permitting.",
        "The heating was repaired last winter after a pipe had burst above the map collection.",
        "Two rooms on the upper floor are reserved for students who prepare for their examinations.",
        "Volunteers sort the donated books every Saturday, and the duplicates are sold for a small sum.",
        "A new catalog went online in March, with photographs of every cover.",
    ],
    "the market": [
        "Every Wednesday the farmers of the valley bring their vegetables to the square in front of the town hall.",
        "The first stalls are ready at six o'clock, long before the buses begin to run.",
        "Cheese from the mountain villages is usually sold out within the first hour.",
        "The council has raised the fee for a stall to twelve euros, the first increase in nine years.",
        "Musicians may play in the northern corner, provided that they do not use amplifiers.",
        "Whoever arrives after noon can often buy strawberries at half the price.",
        "A local bakery gives yesterday's bread away to anyone who asks for it.",
        "In December the market moves into the old railway station, because of the snow.",
    ],
    "the bridge": [
        "The stone bridge across the river was finished in 1861 and carried carts for almost a century.",
        "Engineers measured its pillars last autumn and found cracks in the second and the fourth.",
        "Heavy lorries must therefore take the motorway, which adds eleven kilometers to their journey.",
        "Cyclists and pedestrians are not affected by the closure.",
        "The repair will cost about three million euros, of which the region pays one half.",
        "Work begins in April, as soon as the water level has fallen below two meters.",
        "Divers will examine the foundations before the first stone is removed.",
        "If nothing unexpected happens, the bridge opens again before the harvest festival.",
    ],
    "the orchard": [
        "Behind the monastery lies an orchard with more than two hundred apple trees.",
        "Some of the varieties are known nowhere else, and their names are written on small wooden boards.",
        "In spring the gardeners count the bees, because a cold April means a poor harvest.",
        "The fruit is picked by hand and stored in a cellar that stays cool throughout the year.",
        "Visitors may taste the juice, which is pressed in the courtyard each October.",
        "Sheep keep the grass short, and a wire fence keeps the sheep away from the young trees.",
        "A storm in 2019 uprooted fourteen trees, and their wood became the tables of the guest house.",
        "Anyone can adopt a tree and receives a basket of its apples in return.",
    ],
    "the observatory": [
        "The observatory stands on a hill far from the lights of the city.",
        "Its telescope was built in 1928 and still turns on the original brass gears.",
        "On clear nights visitors can see the rings of Saturn and the moons of Jupiter.",
        "Astronomers now use a digital camera, which is cooled to forty degrees below zero.",
        "School classes come on weekday mornings and learn how to find north without a compass.",
        "The dome is opened by two electric motors, and by hand when the power fails.",
        "Last year the staff discovered a small asteroid and named it after the cleaning lady.",
        "Tickets are free, but everyone has to walk the last five hundred meters in the dark.",
    ],
    "the ferry": [
        "The ferry to the island leaves every forty minutes between sunrise and sunset.",
        "It carries twenty cars and about three hundred passengers, most of them in summer.",
        "The captain has worked on the same route for thirty-one years and knows every sandbank.",
        "Dogs travel for free, provided that they are kept on a short lead.",
        "When the wind is stronger than eight, the crossing is canceled without notice.",
        "A small kitchen below deck serves soup, coffee and sandwiches with smoked fish.",
        "The new electric engines are so quiet that the gulls no longer fly away.",
        "Residents of the island pay half of the ordinary fare and need no reservation.",
    ],
    "the workshop": [
        "In the workshop behind the school pupils learn how to repair their own bicycles.",
        "Tools hang on a painted wall, so that everyone can see at once which of them is missing.",
        "The first lesson is always about brakes, because nothing else matters as much.",
        "Old frames are cleaned, straightened and painted in a color of the owner's choice.",
        "A mechanic from the neighborhood comes twice a month and answers difficult questions.",
        "Spare parts are paid for by a collection box that stands next to the door.",
        "Last year the group restored forty bicycles and gave them to families who had none.",
        "Nobody leaves before the floor has been swept and the lights are switched off.",
    ],
    "the lighthouse": [
        "The lighthouse at the northern cape has not needed a keeper since 1987.",
        "Its lamp is controlled by a computer on the mainland, two hundred kilometers away.",
        "A family from the village looks after the building and paints it every third summer.",
        "The stairs have two hundred and sixteen steps, and there is no elevator.",
        "From the gallery you can watch whales between June and the middle of September.",
        "During the great storm of 1953 the waves broke the windows of the ground floor.",
        "The former kitchen is now a museum with photographs, letters and a brass telescope.",
        "Couples who want to marry in the lantern room have to book a year in advance.",
    ],
}
PLACES = ["a harbor", "an old castle", "a desert town", "a night train", "the moon", "a rainy city", "a small farm",
          "a mountain hut", "a lighthouse", "a circus", "a school for wizards", "a quiet island"]  # fmt: skip
HEROES = ["a clockmaker", "a shy fox", "two sisters", "a retired sailor", "a robot", "a young painter", "a lost letter",
          "a baker", "a talking cat", "a girl with a map", "a violinist", "an old gardener"]  # fmt: skip
SUBJECTS = [
    "bread", "rain", "bicycles", "chess", "volcanoes", "sleep", "trains", "honey", "maps", "glass", "music", "winter",
    "paper", "whales", "gardens", "coffee", "bridges", "dreams", "clocks", "salt", "rivers", "cheese", "stars", "shoes",
    "forests", "languages", "money", "robots", "tea", "mountains", "islands", "painting", "running", "cats", "history",
    "friendship", "electricity", "the moon", "deserts", "cooking", "libraries", "insects", "the sea", "soap", "wool",
    "photography", "memory", "a good letter", "earthquakes", "public speaking", "recycling", "camping", "a small town",
    "swimming", "football", "the heart", "vaccines", "computers", "poetry", "wind", "ships", "birds", "pottery", "fire",
]  # fmt: skip
ASKED = [
    "Explain {} to a child.", "Give me five tips about {}.", "Write a paragraph about {}.", "What is special about {}?",
    "List the advantages and disadvantages of {}.", "Write a short poem about {}.", "How did people discover {}?",
    "Write a short story about {}.", "Describe {} in three sentences.", "Write an email to a friend about {}.",
    "What should everybody know about {}?", "Write a dialog between two people about {}.",
]  # fmt: skip


def passage(i: int) -> str:
    """Six of the eight sentences of one of the texts: 224 different ones."""
    names = list(PASSAGES)
    sentences = PASSAGES[names[i % len(names)]]
    pairs = [(a, b) for a in range(8) for b in range(a)]
    left_out = pairs[i // len(names) % len(pairs)]
    return " ".join(s for j, s in enumerate(sentences) if j not in left_out)


def misspelled(text: str, seed: int, count: int = 4) -> str:
    """The text with two neighboring letters exchanged in `count` of its longer words."""
    draw, words = random.Random(seed), text.split(" ")
    for at in draw.sample([i for i, word in enumerate(words) if len(word) > 6 and word.isalpha()], count):
        word, cut = words[at], draw.randrange(1, 5)
        words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def _copy_edit(i: int) -> str:
    return (
        f"Correct the spelling of this text. Write the corrected text and nothing else.\n\n{misspelled(passage(i), i)}"
    )


def _summary(i: int) -> str:
    return f"Summarize this text in three sentences, in your own words.\n\n{passage(i)}"


def _story(i: int) -> str:
    draw = random.Random(i)
    return f"Write a short story about {draw.choice(HEROES)} and {draw.choice(HEROES)} in {draw.choice(PLACES)}. ({i})"


TASKS: dict[str, Callable[[int], str]] = {"copy-edit": _copy_edit, "summary": _summary, "story": _story}


def messages(task: str, i: int) -> list[dict[str, str]]:
    """The i-th conversation of a task, for `LLM.chat_prompt`."""
    return [{"role": "user", "content": TASKS[task](i)}]


def practice(count: int, seed: int = 0) -> Iterator[list[dict[str, str]]]:
    """Conversations that are none of the tasks': half of them on other subjects, the others to correct or summarize
    paragraphs of CPython's reference.
    """
    draw, told = random.Random(seed), split_paragraphs()[0]
    paragraphs = [part for text in told.values() for part in text.split("\n\n") if 200 < len(part) < 800]
    for i in range(count):
        if i % 2 == 0:
            asked = draw.choice(ASKED).format(draw.choice(SUBJECTS))
        elif i % 4 == 1:
            asked = "Correct the spelling of this text.\n\n" + draw.choice(paragraphs)
        else:
            asked = "Summarize this text.\n\n" + draw.choice(paragraphs)
        yield [{"role": "user", "content": asked}]
