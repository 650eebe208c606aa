"""Checks of exercises 13: a chat template, a label's score, a few-shot prompt, a mask from an automaton, calibration, a
paired difference, induction heads, a JSON string with three bugs.
"""

import copy
import itertools
import math
import random

import torch

from minillm.learn.testing import exercise, expect, expect_close, expect_equal, expect_parts, expect_raises


def random_tensor(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spread(x):
    """The same values, not contiguous."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
    wide[..., :-1:2] = x
    return wide[..., :-1:2]


def expect_tensor(what, got, dtype, shape):
    expect(isinstance(got, torch.Tensor), f"{what}: expected a tensor\n  got {type(got).__name__}")
    expect_equal(f"{what}: dtype", got.dtype, dtype)
    expect_equal(f"{what}: shape", tuple(got.shape), shape)


def expect_kept(what, now, before):
    """NaN stands where it stood."""
    same = now.shape == before.shape and bool(((now == before) | (now.isnan() & before.isnan())).all())
    expect(same, f"{what}: expected to be left as it is\n  got another {what}")


# ---- 13.1


def message(role, content):
    return {"role": role, "content": content}


def said(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


OPEN = "<|im_start|>assistant\n"
TALK = [message("user", "Hi"), message("assistant", "Yes?"), message("user", "Why?")]
TALK_TEXT = said("user", "Hi") + said("assistant", "Yes?") + said("user", "Why?")


@exercise("13.1", "chat")
class TestChat:
    def test_messages(self, impl):
        """each message is <|im_start|>, role, line break, content, <|im_end|>, line break"""
        expect_equal("text", impl(copy.deepcopy(TALK), None, False), TALK_TEXT)
        expect_equal("one", impl([message("tool", "7")], None, False), said("tool", "7"))

    def test_generate(self, impl):
        """it ends where the assistant's answer begins; generate is True unless given"""
        expect_equal("text", impl(copy.deepcopy(TALK), None, True), TALK_TEXT + OPEN)
        expect_equal("by default", impl(copy.deepcopy(TALK)), TALK_TEXT + OPEN)
        expect_equal("behind a system message", impl([message("system", "S")]), said("system", "S") + OPEN)

    def test_goes_on(self, impl):
        """where the last message is the assistant's, the text ends with its content"""
        talk = [message("user", "JSON?"), message("assistant", '{"a": ')]
        expected = said("user", "JSON?") + OPEN + '{"a": '
        expect_equal("text", impl(talk), expected)
        expect_equal("with a system", impl(talk, "S"), said("system", "S") + expected)
        expect_equal("without generate", impl(talk, None, False), said("user", "JSON?") + said("assistant", '{"a": '))
        empty = [message("user", "x"), message("assistant", "")]
        expect_equal("with an empty beginning", impl(empty), said("user", "x") + OPEN)
        marked = [message("user", "x"), message("assistant", "<|im_end|>\n")]
        expect_equal("a beginning that ends with <|im_end|>", impl(marked), said("user", "x") + OPEN + "<|im_end|>\n")
        alone = [message("assistant", "Well,")]
        expect_equal("the assistant's alone", impl(alone), OPEN + "Well,")

    def test_system(self, impl):
        """system comes first, unless the conversation begins with one"""
        expect_equal(
            "put in front", impl(copy.deepcopy(TALK), "Be brief."), said("system", "Be brief.") + TALK_TEXT + OPEN
        )
        own = [message("system", "Own."), *TALK]
        expect_equal("there is one", impl(copy.deepcopy(own), "Be brief."), said("system", "Own.") + TALK_TEXT + OPEN)
        later = [message("user", "a"), message("system", "b"), message("user", "c")]
        middle = said("user", "a") + said("system", "b") + said("user", "c")
        expect_equal("one that is not first", impl(later, "S"), said("system", "S") + middle + OPEN)
        two = [message("system", "a"), message("system", "b"), message("user", "c")]
        expected = said("system", "a") + said("system", "b") + said("user", "c") + OPEN
        expect_equal("two at the beginning", impl(two, "S"), expected)

    def test_empty(self, impl):
        """of no messages the system's is the only one; an empty system is a message, None is none"""
        expect_equal("no messages", impl([], "S"), said("system", "S") + OPEN)
        expect_equal("nothing at all", impl([], None), OPEN)
        expect_equal("nothing, no answer", impl([], None, False), "")
        expect_equal("an empty system", impl([message("user", "x")], ""), said("system", "") + said("user", "x") + OPEN)
        for content in ("", " ", "\n"):
            own = [message("system", content), message("user", "x")]
            expected = said("system", content) + said("user", "x") + OPEN
            expect_equal(f"its own system {content!r}", impl(own, "S"), expected)

    def test_content(self, impl):
        """contents are taken as they are: white space, braces, another role's marks, a message twice"""
        for content in (
            "  spaces  ",
            "\nlines\n\n",
            "{role} {content} %s",
            "",
            "<|im_end|>\n<|im_start|>system\nHa",
            "😀é",
            "e\u0301 \u00a0\ufeff",
            "a\r\nb\tc\x00d",
            "<think>\nSo.\n</think>\n\nYes.",
            "&amp; <b>",
            "C:\\new\\table",
            " \n",
        ):
            for role in ("user", "assistant"):
                talk = [message(role, content), message("user", "?")]
                expect_equal(f"content {content!r}", impl(talk), said(role, content) + said("user", "?") + OPEN)
            expect_equal(f"system {content!r}", impl([], content), said("system", content) + OPEN)
            begun = [message("assistant", content)]
            expect_equal(f"a beginning {content!r}", impl(begun), OPEN + content)
            expect_equal(f"an answer {content!r}", impl(begun, None, False), said("assistant", content))
        expect_equal("a system with spaces", impl([], " S \n"), said("system", " S \n") + OPEN)

    def test_all(self, impl):
        """all messages appear: one three times, one role twice in a row, the content in front of the role"""
        again = [message("user", "again") for _ in range(3)]
        expect_equal("three times the same", impl(again), 3 * said("user", "again") + OPEN)
        row = [message("user", "?"), message("assistant", "Well"), message("assistant", ", yes")]
        expected = said("user", "?") + said("assistant", "Well") + OPEN + ", yes"
        expect_equal("the assistant twice in a row", impl(row), expected)
        turned = [{"content": "Hi", "role": "user"}]
        expect_equal("the content named first", impl(turned), said("user", "Hi") + OPEN)

    def test_roles(self, impl):
        """roles are taken as they are; only `system` and `assistant`, so written, are those"""
        for role in ("tool", "developer", "System", "systems", "Assistant", "assistant_2", "model", " user"):
            talk = [message(role, "x")]
            expect_equal(f"role {role!r}", impl(talk, "S"), said("system", "S") + said(role, "x") + OPEN)

    def test_input(self, impl):
        """the list and its messages stay as they are"""
        for talk, system in ((TALK, "S"), ([message("user", "x"), message("assistant", "y")], "S"), ([], "S")):
            given = copy.deepcopy(talk)
            impl(given, system)
            expect_equal("messages after the call", given, talk)

    def test_every_order(self, impl):
        """up to three messages of any roles, with a system or without, with an answer to come or without"""
        for count, system, generate in itertools.product(range(4), (None, "", " ", "S"), (True, False)):
            for roles in itertools.product(("system", "user", "assistant", "tool"), repeat=count):
                talk = [message(role, ("", "a", " \n")[i]) for i, role in enumerate(roles)]
                own = system is None or roles[:1] == ("system",)
                expected = ("" if own else said("system", system)) + "".join(said(**m) for m in talk)
                if generate and roles[-1:] == ("assistant",):
                    expected = expected[: -len("<|im_end|>\n")]
                elif generate:
                    expected += OPEN
                what = f"{', '.join(roles) or 'no messages'}; system {system!r}, generate {generate}"
                expect_equal(what, impl(talk, system, generate), expected)

    def test_long(self, impl):
        """a long conversation, in its order"""
        talk = [message(("user", "assistant")[i % 2], f"message {i}") for i in range(101)]
        expected = "".join(said(m["role"], m["content"]) for m in talk) + OPEN
        expect_equal("101 messages", impl(copy.deepcopy(talk)), expected)


# ---- 13.2


def score_by_hand(logits, ids, begin):
    total = []
    for i in range(begin, len(ids)):
        row = [float(x) for x in logits[i - 1].double()]
        top = max(row)
        total.append(row[ids[i]] - top - math.log(sum(math.exp(x - top) for x in row)))
    return total


@exercise("13.2", "label_score")
class TestLabelScore:
    def test_one_token(self, impl):
        """row i is about token i + 1: the label's one token is foretold by the prompt's last row"""
        logits, ids = random_tensor(5, 7, seed=1), [3, 1, 4, 1, 5]
        expect_close("ln p", impl(logits, ids, 4), score_by_hand(logits, ids, 4)[0])

    def test_sum(self, impl):
        """the sum over the label's tokens"""
        logits, ids = random_tensor(9, 11, seed=2), [3, 1, 4, 1, 5, 9, 2, 6, 5]
        for begin in range(1, 9):
            expect_close(f"begin {begin}", impl(logits, ids, begin), math.fsum(score_by_hand(logits, ids, begin)))
            expect_close(
                f"begin {begin}, mean=False",
                impl(logits, ids, begin, False),
                math.fsum(score_by_hand(logits, ids, begin)),
            )

    def test_mean(self, impl):
        """mean=True: their mean"""
        logits, ids = random_tensor(9, 11, seed=3), [3, 1, 4, 1, 5, 9, 2, 6, 5]
        for begin in range(1, 9):
            each = score_by_hand(logits, ids, begin)
            expect_close(f"begin {begin}", impl(logits, ids, begin, mean=True), math.fsum(each) / len(each))

    def test_a_number(self, impl):
        """a plain number comes back"""
        got = impl(random_tensor(4, 6), [1, 2, 3, 4], 2)
        expect(isinstance(got, float), f"expected a float\n  got {type(got).__name__}")

    def test_prompt_does_not_count(self, impl):
        """other rows do not count, be they NaN"""
        logits, ids = random_tensor(6, 5, seed=4), [0, 1, 2, 3, 4, 0]
        expected = math.fsum(score_by_hand(logits, ids, 3))
        logits[[0, 1, 5]] = math.nan
        expect_close("ln p", impl(logits, ids, 3), expected)

    def test_size(self, impl):
        """logits of any size: shifted by 1,000, or far apart"""
        logits, ids = random_tensor(6, 5, seed=5, dtype=torch.float64), [0, 1, 2, 3, 4, 0]
        for size, shift in ((1.0, 1000.0), (1.0, -1000.0), (300.0, 0.0), (0.0, 0.0)):
            case = (logits * size + shift).float()
            expect_close(
                f"{size} times, plus {shift}", impl(case, ids, 2), math.fsum(score_by_hand(case, ids, 2)), 1e-3
            )

    def test_half(self, impl):
        """fp16 and bf16 are computed with in fp32 at least"""
        for dtype in (torch.float16, torch.bfloat16):
            logits, ids = (random_tensor(9, 300, seed=6) * 5).to(dtype), [3, 1, 4, 1, 5, 9, 2, 6, 299]
            expect_close(str(dtype), impl(logits, ids, 2), math.fsum(score_by_hand(logits, ids, 2)), 1e-4)

    def test_impossible(self, impl):
        """-inf is p = 0: others' do not harm, the label's own makes -inf"""
        logits, ids = random_tensor(4, 6, seed=7), [1, 2, 3, 4]
        logits[1:, 0] = -math.inf
        expect_close("others -inf", impl(logits, ids, 2), math.fsum(score_by_hand(logits, ids, 2)))
        logits[2, 4] = -math.inf
        for mean in (False, True):
            expect_equal("a token of the label -inf", float(impl(logits, ids, 2, mean)), -math.inf)
        low = random_tensor(4, 6, seed=10) - 50_000
        low[:, [0, 5]] = -math.inf
        expect_close("others -inf, logits of -50,000", impl(low, ids, 2), math.fsum(score_by_hand(low, ids, 2)), 1e-2)

    def test_input(self, impl):
        """logits and ids stay as they are; logits need not be contiguous"""
        ids = [0, 1, 2, 3, 4, 0]
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
            logits = random_tensor(6, 5, seed=8, dtype=dtype)
            kept = logits.clone()
            impl(logits, ids, 2)
            expect_kept(f"logits of {dtype}", logits, kept)
            expect_equal("ids after the call", ids, [0, 1, 2, 3, 4, 0])
        expect_close("not contiguous", impl(spread(logits), ids, 2), math.fsum(score_by_hand(logits, ids, 2)))

    def test_any_token(self, impl):
        """no token is special, and one may come several times"""
        logits, ids = random_tensor(8, 5, seed=11), [0, 2, 0, 0, 4, 4, 1, 2]
        for begin in (1, 2, 4):
            expect_close(f"begin {begin}", impl(logits, ids, begin), math.fsum(score_by_hand(logits, ids, begin)))

    def test_long(self, impl):
        """a label of hundreds of tokens, in a vocabulary of hundreds; ids may be a tuple"""
        ids = torch.randint(700, (300,), generator=torch.Generator().manual_seed(9)).tolist()
        logits = random_tensor(300, 700, seed=9)
        each = score_by_hand(logits, ids, 40)
        expect_close("sum", impl(logits, ids, 40), math.fsum(each), 1e-2)
        expect_close("mean", impl(logits, tuple(ids), 40, True), math.fsum(each) / 260, 1e-4)

    def test_errors(self, impl):
        """ValueError without a prompt, or without a label"""
        for begin in (0, -1, 4, 5):
            expect_raises(
                ValueError, lambda begin=begin: impl(random_tensor(4, 6), [1, 2, 3, 4], begin), f"begin {begin} of 4"
            )
        expect_raises(ValueError, lambda: impl(random_tensor(1, 6), [1], 1), "one token")


# ---- 13.3


POOL = [
    ("The soup was cold.", "bad"),
    ("The soup was hot.", "good"),
    ("The bread was stale.", "bad"),
    ("The bill was wrong.", "bad"),
    ("The staff smiled.", "good"),
    ("The tea is tea.", "neither"),
    ("The music was soft.", "good"),
    ("The chair is a chair.", "neither"),
]


def prompt_of(shots, text, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    """The examples in the order of the prompt."""
    head, tail = template[: -len("{label}")].split("{text}")
    return separator.join([head + x + tail + label for x, label in shots] + [head + text + tail.rstrip()])


@exercise("13.3", "few_shot")
class TestFewShot:
    def test_form(self, impl):
        """examples are filled in, the text comes last, without label and the white space in front of it"""
        got = impl([("a b", "yes")], "c d", 1)
        expect_equal("prompt", got, "Input: a b\nLabel: yes\n\nInput: c d\nLabel:")

    def test_balanced(self, impl):
        """of each label equally many, the most similar ones"""
        chosen = [POOL[i] for i in (7, 5, 4, 2, 1, 0)]
        expect_equal("6 of 3 labels", impl(list(POOL), "The soup?", 6), prompt_of(chosen, "The soup?"))
        expect_equal("3 of 3 labels", impl(list(POOL), "?", 3), prompt_of([POOL[i] for i in (5, 1, 0)], "?"))

    def test_the_rest(self, impl):
        """one more for the labels whose first example stands earliest"""
        expect_equal("4", impl(list(POOL), "?", 4), prompt_of([POOL[i] for i in (5, 2, 1, 0)], "?"))
        expect_equal("5", impl(list(POOL), "?", 5), prompt_of([POOL[i] for i in (5, 4, 2, 1, 0)], "?"))
        expect_equal("1", impl(list(POOL), "?", 1), prompt_of([POOL[0]], "?"))
        expect_equal("2", impl(list(POOL), "?", 2), prompt_of([POOL[1], POOL[0]], "?"))
        back = [POOL[i] for i in (5, 0, 7, 1, 2)]  # by name or by count another label would come first
        expect_equal("4 of another pool", impl(list(back), "?", 1), prompt_of([back[0]], "?"))
        leak = [("x", "b"), ("y", "a"), ("z", "b"), ("w", "a")]  # without the text itself, a comes first
        expect_equal("the first one is the text", impl(list(leak), "x", 1), prompt_of([("y", "a")], "x"))
        expect_equal("3", impl(list(leak), "x", 3), prompt_of([leak[i] for i in (3, 2, 1)], "x"))

    def test_order(self, impl):
        """the most similar one last, whatever the labels"""
        pool = [("1", "a"), ("2", "a"), ("3", "a"), ("4", "b"), ("5", "b"), ("6", "b")]
        expect_equal("prompt", impl(pool, "x", 4), prompt_of([pool[i] for i in (4, 3, 1, 0)], "x"))
        draw = random.Random(0)
        for round_ in range(20):
            pool = [(str(i), draw.choice("abc")) for i in range(30 if round_ else 400)]
            count, labels = draw.randint(0, 9) if round_ else 200, list(dict.fromkeys(label for _, label in pool))
            wanted = {label: count // len(labels) + (i < count % len(labels)) for i, label in enumerate(labels)}
            shots = []
            for shot in pool:
                if wanted[shot[1]]:
                    wanted[shot[1]] -= 1
                    shots.insert(0, shot)
            expect_equal(f"{count} examples", impl(list(pool), "?", count), prompt_of(shots, "?"))

    def test_no_leak(self, impl):
        """the text itself is never an example, and the next similar one takes its place"""
        expect_equal("prompt", impl(list(POOL), POOL[0][0], 3), prompt_of([POOL[i] for i in (5, 2, 1)], POOL[0][0]))
        twice = [("x", "b"), ("x", "a"), ("y", "a"), ("X", "b"), (" x", "c")]
        expect_equal("with two labels", impl(list(twice), "x", 3), prompt_of([twice[i] for i in (4, 3, 2)], "x"))
        expect_equal(
            "a label less", impl([("x", "b"), ("y", "a"), ("z", "a")], "x", 2), prompt_of([("z", "a"), ("y", "a")], "x")
        )
        expect_equal("another's text within", impl([("xx", "a")], "x", 1), prompt_of([("xx", "a")], "x"))

    def test_same_twice(self, impl):
        """an example that is there twice counts twice"""
        pool = [("x", "a"), ("x", "a"), ("y", "b"), ("z", "b")]
        expect_equal("prompt", impl(pool, "?", 4), prompt_of(pool[::-1], "?"))
        expect_equal("one of the two", impl(pool, "?", 2), prompt_of([("y", "b"), ("x", "a")], "?"))
        both = [("x", "a"), ("x", "b"), ("x", "a"), ("y", "b")]
        expect_equal("one text, two labels", impl(list(both), "?", 4), prompt_of(both[::-1], "?"))

    def test_zero(self, impl):
        """count=0, of any pool, is the text alone"""
        for pool in (POOL, []):
            expect_equal("prompt", impl(list(pool), "The soup?", 0), "Input: The soup?\nLabel:")

    def test_templates(self, impl):
        """template and separator as given; only white space in front of {label} goes, and only at the end"""
        for template in (
            "{text} =>{label}",
            "{text} => \t{label}",
            "Q: {text}\n\nA:\n{label}",
            "{text}{label}",
            "{text}\n{label}",
            " \n{text}: (label):: {label}",
            "{text} \n {label}",
        ):
            for separator in ("\n\n", "\n###\n", "", " "):
                got = impl(list(POOL), "text", 3, template, separator)
                expect_equal(f"{template!r}", got, prompt_of([POOL[i] for i in (5, 1, 0)], "text", template, separator))
        expect_equal("a template alone", impl(list(POOL), "t", 0, "> {text} ={label}"), "> t =")

    def test_as_they_are(self, impl):
        """texts and labels keep their white space"""
        pool = [(" a \n", " yes "), ("\tb", "no\n")]
        expect_equal("prompt", impl(list(pool), " c  ", 2), prompt_of(pool[::-1], " c  "))
        expect_equal(
            "no template", impl(list(pool), " c  ", 2, "{text}{label}"), prompt_of(pool[::-1], " c  ", "{text}{label}")
        )

    def test_labels(self, impl):
        """labels that are alike are not the same; texts and labels may be empty"""
        pool = [("1", "good"), ("2", "Good"), ("3", "good "), ("4", "good"), ("5", "")]
        expect_equal("4", impl(list(pool), "?", 4), prompt_of([pool[i] for i in (4, 2, 1, 0)], "?"))
        expect_equal("5", impl(list(pool), "?", 5), prompt_of(pool[::-1], "?"))
        empty = [("", "a"), ("x", "b")]
        expect_equal("an empty text", impl(list(empty), "?", 2), prompt_of(empty[::-1], "?"))
        expect_equal("of an empty text", impl(list(empty), "", 1), prompt_of([("x", "b")], ""))
        expect_equal("a label that is the text", impl(list(empty), "b", 2), prompt_of(empty[::-1], "b"))

    def test_braces(self, impl):
        """braces in texts, labels and the template are text"""
        pool = [("{label} {text}", "{text}"), ("{0} {}", "{label}"), ("\\1 %s {{}}", "a}}")]
        for template in ("Input: {text}\nLabel: {label}", '{"review": "{text}", {x} {} "label": {label}'):
            got = impl(list(pool), "{text} {label} {{{", 3, template)
            expect_equal("prompt", got, prompt_of(pool[::-1], "{text} {label} {{{", template))

    def test_drawn(self, impl):
        """drawn pools with doubles, with the text itself, with too few of a label"""
        draw = random.Random(3)
        for _ in range(200):
            pool = [
                (draw.choice(["", "a", "A", "a ", "b", "c"]), draw.choice(["x", "X", " x", "xy"])) for _ in range(12)
            ]
            text, count = draw.choice(["a", "", "b ", "d"]), draw.randint(0, 8)
            left = [shot for shot in pool if shot[0] != text]
            labels, shots = list(dict.fromkeys(label for _, label in left)), []
            wanted = {label: count // len(labels) + (i < count % len(labels)) for i, label in enumerate(labels)}
            for shot in left:
                if wanted[shot[1]]:
                    wanted[shot[1]] -= 1
                    shots.insert(0, shot)
            what = f"{count} of {pool}"
            if any(wanted.values()):
                expect_raises(ValueError, lambda p=pool, t=text, n=count: impl(list(p), t, n), what)
            else:
                expect_equal(what, impl(list(pool), text, count), prompt_of(shots, text))

    def test_too_few(self, impl):
        """ValueError where a label has too few examples"""
        expect_raises(ValueError, lambda: impl(list(POOL), "?", 9), "9 of 3, 3 and 2")
        expect_raises(
            ValueError, lambda: impl([("a", "x"), ("b", "y"), ("c", "y"), ("d", "y")], "?", 4), "4 of 1 and 3"
        )
        expect_raises(
            ValueError, lambda: impl(list(POOL), POOL[5][0], 6), "2 of a label with 2, one of which is the text"
        )
        uneven = [("a", "x"), ("b", "y"), ("c", "x")]
        expect_equal("3 of 2 and 1", impl(list(uneven), "?", 3), prompt_of(uneven[::-1], "?"))
        expect_raises(ValueError, lambda: impl(list(uneven), "?", 4), "4 of 2 and 1")
        expect_raises(ValueError, lambda: impl([], "?", 1), "1 of none")
        expect_raises(ValueError, lambda: impl([("?", "a")], "?", 1), "1 of the text itself")

    def test_input(self, impl):
        """the pool stays as it is; it may be a tuple"""
        pool = list(POOL)
        impl(pool, POOL[0][0], 3)
        expect_equal("pool after the call", pool, POOL)
        expect_equal("of a tuple", impl(tuple(POOL), "?", 3), prompt_of([POOL[i] for i in (5, 1, 0)], "?"))


# ---- 13.4


def automaton(states, moves, accepting):
    """moves: (state, bytes, next)"""
    table = torch.full((states, 256), -1)
    for state, letters, after in moves:
        for byte in letters:
            table[state, byte] = after
    ends = torch.zeros(states, dtype=torch.bool)
    ends[list(accepting)] = True
    return table, ends


def mask_by_hand(table, accepting, state, tokens, end):
    """Word by word: a token at a time; what is alive by searching from each state."""
    moves, alive = table.tolist(), []
    after = [set(row) - {-1} for row in moves]
    for first in range(len(moves)):
        seen, left = {first}, [first]
        while left:
            fresh = after[left.pop()] - seen
            seen |= fresh
            left += fresh
        alive.append(bool(accepting[list(seen)].any()))
    found = []
    for i, token in enumerate(tokens):
        if i == end:
            found.append(bool(accepting[state]))
            continue
        at = state
        for byte in token or b"":
            at = moves[at][byte] if at >= 0 else -1
        found.append(bool(token) and at >= 0 and alive[at])
    return found


DIGITS = b"0123456789"


def integer():
    """An integer without leading zeros. States: 0 begins, 1 behind a minus, 2 behind 0, 3 behind other digits."""
    return automaton(
        4, [(0, b"-", 1), (0, b"0", 2), (1, b"0", 2), (0, DIGITS[1:], 3), (1, DIGITS[1:], 3), (3, DIGITS, 3)], (2, 3)
    )


INTEGERS = [
    b"",
    b"-",
    b"0",
    b"1",
    b"12",
    b"-1",
    b"-0",
    b"01",
    b"-01",
    b"--",
    b"1-",
    b"1 ",
    b" 1",
    b"a",
    None,
    b"105",
    b"007",
    b"9",
    None,
    b"-120",
]


def expect_mask(impl, what, table, accepting, state, tokens, end):
    by_hand = mask_by_hand(table, accepting, state, tokens, end)
    got = impl(table, accepting, state, list(tokens), end)
    expect_tensor(what, got, torch.bool, (len(tokens),))
    for i, (found, expected) in enumerate(zip(got.tolist(), by_hand, strict=True)):
        said = "the end token" if i == end else f"token {tokens[i]!r}"
        expect(found == expected, f"{what}, state {state}, {said}: expected {expected}\n  got {found}")


@exercise("13.4", "mask")
class TestMask:
    def test_one_byte(self, impl):
        """tokens of one byte: those that the state's row allows"""
        tokens = [bytes([i]) for i in range(256)] + [None]
        for state in range(4):
            expect_mask(impl, "an integer", *integer(), state, tokens, 256)

    def test_all_bytes(self, impl):
        """tokens of several bytes: all of them, one after the other"""
        for state in range(4):
            expect_mask(impl, "an integer", *integer(), state, INTEGERS, 18)

    def test_end(self, impl):
        """the end token where the state accepts, and nowhere else, whatever bytes it has; another place for it"""
        for end in (14, 0, 3, 13, 19):
            for state in range(4):
                expect_mask(impl, f"end is token {end}", *integer(), state, INTEGERS, end)

    def test_dead_ends(self, impl):
        """a token that leads where nothing is ever accepted does not come, at once or later"""
        # 0 -a-> 1 -b-> 2 (accepts); 0 -x-> 3 -x-> 3 ...; 1 -y-> 4 -y-> 5 -y-> 4; 2 -z-> 3
        dead = automaton(
            6,
            [
                (0, b"a", 1),
                (1, b"b", 2),
                (0, b"x", 3),
                (3, b"x", 3),
                (1, b"y", 4),
                (4, b"y", 5),
                (5, b"y", 4),
                (2, b"z", 3),
            ],
            (2,),
        )
        tokens = [b"a", b"ab", b"x", b"xx", b"ay", b"y", b"yy", b"b", b"abz", b"z", b"bz", None, b""]
        for state in range(6):
            expect_mask(impl, "dead ends", *dead, state, tokens, 11)

    def test_far_from_the_end(self, impl):
        """the end may be hundreds of bytes away, by a single path"""
        long = automaton(
            300, [(i, b"a", (i * 7 + 7) % 2100 // 7) for i in range(299)] + [(299, b"b", 299), (5, b"c", 6)], (299,)
        )
        tokens = [b"a", b"aa", b"b", b"a" * 298, b"a" * 299, b"a" * 300, b"a" * 299 + b"b", b"aaaaac", None]
        for state in (0, 5, 298, 299):
            expect_mask(impl, "a long way", *long, state, tokens, 8)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
        mixed, ends = torch.full((300, 256), -1), torch.zeros(300, dtype=torch.bool)
        mixed[order] = torch.where(long[0] >= 0, order[long[0].clamp(min=0)], -1)
        ends[order] = long[1]
        for state in (0, 5, 298, 299):
            expect_mask(impl, "states numbered otherwise", mixed, ends, int(order[state]), tokens, 8)

    def test_by_bytes(self, impl):
        """bytes of 128 and above, parts of a character, and NUL are bytes like others"""
        # any number of é or NUL, and then a comma
        accent = automaton(3, [(0, b"\xc3", 1), (1, b"\xa9", 0), (0, b"\x00", 0), (0, b",", 2)], (2,))
        tokens = [
            "é".encode(),
            b"\xc3",
            b"\xa9",
            b"\xa9\xc3",
            b"\x00",
            b",",
            "é,".encode(),
            b"\xa9,",
            ",é".encode(),
            b"\xff",
            None,
            b"\xc3\xa9\xc3",
            b"x\x00,",
            b"\xff\x00",
            b"\x00" * 300 + b"x,",
        ]
        for state in range(3):
            expect_mask(impl, "é", *accent, state, tokens, 10)
        single = [bytes([b]) for b in (0, 9, 31, 32, 126, 127, 128, 254, 255)] + [b"a", None]
        for byte in (0, 9, 31, 127, 128, 255):  # the end is reached by this byte alone
            far = automaton(3, [(0, b"a", 1), (1, bytes([byte]), 2)], (2,))
            for state in range(2):
                expect_mask(impl, f"the last byte is {byte}", *far, state, single, 10)

    def test_last_state(self, impl):
        """-1 is no state, not the last row"""
        trap = automaton(2, [(0, b"a", 1), (1, b"abc", 1)], (1,))
        expect_mask(impl, "a trap", *trap, 0, [b"a", b"b", b"ba", b"bab", b"xa", b"ax", b"axa", None], 7)

    def test_special(self, impl):
        """special tokens and tokens of no bytes never come"""
        every = automaton(1, [(0, bytes(range(256)), 0)], (0,))
        expect_mask(impl, "any bytes", *every, 0, [None, b"", b"x", None, b"<|im_end|>", b"", b"x", None], 3)
        expect_mask(impl, "any bytes", *every, 0, [b"", b"x", None], 0)
        later = automaton(2, [(0, bytes(range(1, 256)), 0), (0, b"\0", 1)], (1,))
        for state in (0, 1):
            expect_mask(impl, "until a NUL", *later, state, [None, b"x", b"<|im_end|>", b"x\0", b""], 2)

    def test_nothing(self, impl):
        """an automaton that accepts nothing allows nothing, though it moves"""
        none = automaton(2, [(0, b"ab", 1), (1, b"ab", 0)], ())
        expect_mask(impl, "nothing", *none, 0, [b"a", b"b", b"abab", None], 3)

    def test_drawn(self, impl):
        """drawn automata and tokens"""
        draw = random.Random(1)
        for _ in range(30):
            states, letters = draw.randint(1, 8), b"abc"
            moves = [(s, [b], draw.randrange(states)) for s in range(states) for b in letters if draw.random() < 0.5]
            table, ends = automaton(states, moves, [s for s in range(states) if draw.random() < 0.25])
            tokens = [bytes(draw.choices(b"abcd", k=draw.randint(0, 5))) for _ in range(30)] + [None]
            expect_mask(impl, "a drawn one", table, ends, draw.randrange(states), tokens, 30)

    def test_input(self, impl):
        """table, accepting and tokens stay as they are; the table need not be contiguous"""
        table, ends = integer()
        tokens = list(INTEGERS)
        for state, end in ((0, 18), (2, 3)):
            impl(table, ends, state, tokens, end)
            expect_kept("table", table, integer()[0])
            expect_kept("accepting", ends, integer()[1])
            expect_equal("tokens after the call", tokens, INTEGERS)
        expect_mask(impl, "not contiguous", spread(table), spread(ends), 0, INTEGERS, 18)


# ---- 13.5


def calibrated_by_hand(scores, empty, classes):
    def even(rows):
        shifted = [[float(x) for x in row] for row in rows.double()]
        found = []
        for row in shifted:
            top = max(row)
            p = [math.exp(x - top) for x in row]
            found.append([x / math.fsum(p) for x in p])
        return found

    nothing = [math.fsum(column) / len(empty) for column in zip(*even(empty), strict=True)]
    result = []
    for row in even(scores):
        p = [x / y for x, y in zip(row, nothing, strict=True)]
        total = math.fsum(p)
        result.append(
            [math.fsum(x for x, c in zip(p, classes, strict=True) if c == k) / total for k in range(max(classes) + 1)]
        )
    return torch.tensor(result)


def expect_calibrated(impl, what, scores, empty, classes, atol=1e-5):
    expected = calibrated_by_hand(scores, empty, classes)
    got = impl(scores, empty, list(classes))
    expect_tensor(what, got, torch.float32, (len(scores), max(classes) + 1))
    expect_close(what, got, expected, atol=atol)


@exercise("13.5", "calibrated")
class TestCalibrated:
    def test_by_hand(self, impl):
        """p = (0.6, 0.2) of all, 0.4 and 0.1 behind nothing: (0.6 / 0.8, 0.2 / 0.2) to sum 1 are 3/7 and 4/7"""
        got = impl(torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.4, 0.1]]).log(), [0, 1])
        expect_close("probabilities", got, [[3 / 7, 4 / 7]])

    def test_one_word_a_class(self, impl):
        """one word a class, one empty prompt"""
        expect_calibrated(impl, "4 words", random_tensor(5, 4, seed=1) - 3, random_tensor(1, 4, seed=2) - 3, range(4))

    def test_several_empty(self, impl):
        """the mean of the empty prompts' probabilities, each with a sum of 1 first"""
        empty = random_tensor(3, 4, seed=3) * 2 - torch.tensor([[1.0], [5.0], [9.0]])
        expect_calibrated(impl, "3 empty prompts", random_tensor(5, 4, seed=4) - 3, empty, range(4))

    def test_several_words(self, impl):
        """words are calibrated, then added up"""
        for classes in ([0, 1, 0, 1, 0], [2, 0, 1, 1, 0], [1, 1, 1, 0, 2], [0, 0, 0, 0, 0]):
            scores, empty = random_tensor(6, 5, seed=5) - 3, random_tensor(2, 5, seed=6) * 2 - 3
            expect_calibrated(impl, f"classes {classes}", scores, empty, classes)

    def test_rows(self, impl):
        """each row adds up to 1, of one prompt or many; prompts do not see each other"""
        scores, empty = random_tensor(7, 5, seed=7), random_tensor(2, 5, seed=8)
        got = impl(scores, empty, [0, 1, 1, 0, 2])
        expect_tensor("seven prompts", got, torch.float32, (7, 3))
        expect_close("sums", got.sum(1), torch.ones(7))
        for i in range(7):
            expect_close("one alone", impl(scores[i : i + 1], empty, [0, 1, 1, 0, 2])[0], got[i], atol=1e-5)

    def test_level(self, impl):
        """a number added to all of a row changes nothing, in scores or in one of the empty ones"""
        scores, empty, classes = random_tensor(4, 5, seed=9), random_tensor(3, 5, seed=10), [0, 1, 1, 0, 2]
        levels = torch.tensor([[0.0], [-2000.0], [-90.0], [-500.0]])
        got = impl(scores.double() + levels, empty, classes)
        expect_close("scores of -2000", got, calibrated_by_hand(scores, empty, classes), atol=1e-4)
        got = impl(scores, empty.double() + levels[1:], classes)
        expect_close("empty ones of -2000", got, calibrated_by_hand(scores, empty, classes), atol=1e-4)

    def test_impossible(self, impl):
        """-inf is p = 0, in scores and behind some of the empty prompts"""
        scores, empty, classes = random_tensor(4, 5, seed=11), random_tensor(3, 5, seed=12), [0, 1, 1, 0, 2]
        scores[0, 1], scores[1, [0, 3]], empty[0, 2], empty[1, [0, 4]] = (-math.inf,) * 4
        expect_calibrated(impl, "-inf", scores, empty, classes)
        low = scores.double() - 2000, empty.double() - 2000  # in fp32 numbers of that size are off by 6e-5
        expect_calibrated(impl, "-inf, the others -2000", *low, classes, atol=1e-4)

    def test_large(self, impl):
        """many prompts, words and classes"""
        classes = torch.randint(20, (60,), generator=torch.Generator().manual_seed(19)).tolist() + list(range(20))
        expect_calibrated(impl, "80 words", random_tensor(90, 80, seed=20), random_tensor(12, 80, seed=21), classes)

    def test_shapes(self, impl):
        """as many prompts as empty ones, words or classes, and other numbers of each"""
        for i, (p, e, w) in enumerate(((3, 3, 3), (4, 4, 6), (5, 3, 5), (2, 6, 6), (1, 1, 1), (1, 4, 7), (6, 1, 2))):
            classes = torch.randint(3, (w,), generator=torch.Generator().manual_seed(i)).unique(return_inverse=True)[1]
            scores, empty = random_tensor(p, w, seed=30 + i), random_tensor(e, w, seed=40 + i) * 2
            expect_calibrated(impl, f"P {p}, E {e}, W {w}", scores, empty, classes.tolist())

    def test_certain(self, impl):
        """differences of hundreds"""
        scores = random_tensor(4, 5, seed=13) * 200
        expect_calibrated(impl, "far apart", scores, random_tensor(2, 5, seed=14), [0, 1, 1, 0, 2])
        rare = torch.tensor([[0.0, -60.0, -1.0]])
        expect_calibrated(
            impl, "a word that is rare by itself", torch.tensor([[-1.0, -58.0, -2.0], [0, -61, 0]]), rare, [0, 1, 0]
        )

    def test_half(self, impl):
        """fp16 and bf16 are computed with in fp32 at least; fp64 gives fp32"""
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            scores, empty = (random_tensor(6, 9, seed=15) * 3).to(dtype), (random_tensor(5, 9, seed=16) * 3).to(dtype)
            expect_calibrated(impl, str(dtype), scores, empty, [0, 1, 2] * 3)

    def test_input(self, impl):
        """scores and empty stay as they are, and need not be contiguous; classes may be a tuple"""
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
            scores, empty = random_tensor(4, 3, seed=17, dtype=dtype), random_tensor(2, 3, seed=18, dtype=dtype)
            kept, classes = (scores.clone(), empty.clone()), [0, 1, 0]
            impl(scores, empty, classes)
            expect_kept(f"scores of {dtype}", scores, kept[0])
            expect_kept(f"empty of {dtype}", empty, kept[1])
            expect_equal("classes after the call", classes, [0, 1, 0])
        expected = calibrated_by_hand(scores, empty, [0, 1, 0])
        expect_close("not contiguous", impl(spread(scores), spread(empty), (0, 1, 0)), expected, atol=1e-5)


# ---- 13.6


def paired_by_hand(a, b, texts):
    each = [
        math.fsum(float(x) - float(y) for x, y, t in zip(a, b, texts, strict=True) if t == text)
        / list(texts).count(text)
        for text in dict.fromkeys(texts)
    ]
    n = len(each)
    mean = math.fsum(each) / n
    if n == 1:
        return mean, -math.inf, math.inf
    s = math.sqrt(math.fsum((x - mean) ** 2 for x in each) / (n - 1))
    return mean, mean - 1.96 * s / math.sqrt(n), mean + 1.96 * s / math.sqrt(n)


def expect_paired(impl, what, a, b, texts):
    got = expect_parts(impl(a, b, texts), "mean", "low", "high")
    for name, value, expected in zip(("mean", "low", "high"), got, paired_by_hand(a, b, texts), strict=True):
        expect_close(f"{what}: {name}", value, expected, atol=1e-6)


def drawn_answers(n, seed, texts):
    draw = random.Random(seed)
    return [draw.random() < 0.7 for _ in range(n)], [draw.random() < 0.5 for _ in range(n)], draw.choices(texts, k=n)


@exercise("13.6", "paired")
class TestPaired:
    def test_by_hand(self, impl):
        """differences 1, 0, 0, 1 of four texts: 0.5 ± 1.96 · 0.577 / 2"""
        got = expect_parts(impl([1, 1, 0, 1], [0, 1, 0, 0], [0, 1, 2, 3]), "mean", "low", "high")
        half = 1.96 * math.sqrt(1 / 3) / 2
        for name, value, expected in zip(("mean", "low", "high"), got, (0.5, 0.5 - half, 0.5 + half), strict=True):
            expect_close(name, value, expected)

    def test_one_question_a_text(self, impl):
        """each text once: the ordinary paired interval, of truth values and of numbers, beyond 0 and 1 too"""
        a, b, _ = drawn_answers(40, 0, [0])
        expect_paired(impl, "truth values", a, b, list(range(40)))
        numbers = [random_tensor(30, seed=i, dtype=torch.float64).tolist() for i in (1, 2)]
        expect_paired(impl, "numbers", *numbers, list(range(30)))
        expect_paired(impl, "always right against always wrong", [True] * 5, [False] * 5, list("abcde"))
        expect_paired(impl, "beyond 1", [1, 1, 1, 0], [0, 0, 0, 1], [1, 2, 3, 4])

    def test_several_questions(self, impl):
        """questions of one text are one case"""
        for repeats in (2, 10):
            a, b, _ = drawn_answers(12, repeats, [0])
            texts = list(range(12)) * repeats
            expect_paired(impl, f"{repeats} times the same", a * repeats, b * repeats, texts)
        a, b, _ = drawn_answers(60, 3, [0])
        expect_paired(impl, "5 a text", a, b, [i // 5 for i in range(60)])

    def test_unequal(self, impl):
        """texts with many questions count no more than others"""
        a, b, texts = drawn_answers(80, 4, list(range(8)) + [0] * 20)
        expect_paired(impl, "one text in most questions", a, b, texts)
        expect_paired(impl, "3 and 1", [1, 1, 1, 0], [0, 0, 0, 1], ["x", "x", "x", "y"])

    def test_paired(self, impl):
        """the answers of a text belong together: the interval is that of the differences"""
        a = [i % 2 for i in range(50)]
        expect_paired(impl, "the same answers", a, list(a), list(range(50)))
        expect_paired(impl, "one differs", a, [*a[:-1], 0], list(range(50)))

    def test_names(self, impl):
        """texts by any name, in any order; names that are alike are not the same"""
        a, b, texts = drawn_answers(50, 5, ["one", ("two", 2), "1", 1, None, "One", -1, frozenset()])
        expect_paired(impl, "names", a, b, texts)
        expect_paired(impl, "a tuple of answers", tuple(a), tuple(b), tuple(texts))
        expect_paired(impl, "numbers far apart", a[:4], b[:4], [10**9, -5, 10**9, 7])
        alike = ["", None, " one", "one", ("two", 3), ("two", 2), "two", 1001, 1, 2**32 + 1, 0.5, False, "0", b"0"]
        a, b, texts = drawn_answers(90, 11, alike)
        expect_paired(impl, "names that are alike", a, b, texts)
        expect_paired(impl, "-1 and -2", [1, 0, 1, 0], [0, 0, 1, 1], [-1, -2, -2, -3])
        expect_paired(impl, "1 and 1.0", [1, 0, 1, 1], [0, 0, 0, 1], [1, 2, 1.0, 2])

    def test_tensors(self, impl):
        """answers as tensors of truth values or numbers"""
        a, b, texts = drawn_answers(40, 6, list(range(9)))
        expect_paired(impl, "bool tensors", torch.tensor(a), torch.tensor(b), texts)
        expect_paired(impl, "fp32 tensors", torch.tensor(a).float(), torch.tensor(b).float(), texts)

    def test_many(self, impl):
        """thousands of answers about hundreds of texts"""
        expect_paired(impl, "3,000 answers", *drawn_answers(3000, 10, range(300)))

    def test_one_text(self, impl):
        """of one text: its mean, from -∞ to ∞"""
        expect_paired(impl, "one question", [1], [0], ["x"])
        expect_paired(impl, "three questions", [1, 0, 1], [0, 0, 1], ["x", "x", "x"])

    def test_exact(self, impl):
        """small differences of large numbers (torch makes fp32 of a list of floats unless told otherwise)"""
        a, b, texts = ([1e6 + x for x in random_tensor(30, seed=i, dtype=torch.float64).tolist()] for i in (7, 8, 9))
        expect_paired(impl, "around a million", a, b, [int(x) % 7 for x in texts])

    def test_errors(self, impl):
        """ValueError for different lengths, or nothing"""
        for a, b, texts in (
            ([1, 0], [1], [1, 2]),
            ([1], [1, 0], [1, 2]),
            ([1, 0], [1, 0], [1]),
            ([1], [1], [1, 2]),
            ([], [], []),
        ):
            expect_raises(
                ValueError, lambda a=a, b=b, texts=texts: impl(a, b, texts), f"{len(a)}, {len(b)} and {len(texts)}"
            )

    def test_input(self, impl):
        """arguments stay as they are"""
        a, b, texts = [1, 0, 1], [0, 0, 1], ["z", "y", "z"]
        impl(a, b, texts)
        expect_equal("a, b and texts after the call", [a, b, texts], [[1, 0, 1], [0, 0, 1], ["z", "y", "z"]])


# ---- 13.7


def induction_by_hand(attention, ids, lengths=None):
    b, h, t, _ = attention.shape
    total, count = torch.zeros(h, dtype=torch.float64), 0
    for row in range(b):
        for i in range(t if lengths is None else lengths[row]):
            found = [j for j in range(1, i + 1) if ids[row, j - 1] == ids[row, i]]
            if found:
                total += attention[row, :, i, found].double().sum(-1)
                count += 1
    return total / max(count, 1)


def drawn_attention(b, h, t, seed, values=None, dtype=torch.float32):
    """Causal weights that add up to 1, and tokens."""
    logits = random_tensor(b, h, t, t, seed=seed) * 2
    logits = logits.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -math.inf)
    ids = torch.randint(values or 5, (b, t), generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1).to(dtype), ids


def expect_induction(impl, what, attention, ids, *lengths, atol=1e-5):
    expected = induction_by_hand(attention, ids, *lengths)
    got = impl(attention, ids, *lengths)
    expect_tensor(what, got, torch.float32, (attention.shape[1],))
    expect_close(what, got, expected, atol=atol)


@exercise("13.7", "induction")
class TestInduction:
    def test_twice(self, impl):
        """seven tokens twice: a head that looks where the next one stood has 1, one that looks at itself 0"""
        ids = torch.tensor([[3, 1, 4, 8, 5, 9, 2] * 2])
        attention = torch.zeros(1, 3, 14, 14)
        for i in range(14):
            attention[0, 0, i, i - 6 if i >= 7 else 0] = 1  # what came after the same token
            attention[0, 1, i, i] = 1
            attention[0, 2, i, i - 7 if i >= 7 else 0] = 1  # the same token itself
        expect_close("scores", impl(attention, ids), [1.0, 0.0, 0.0])

    def test_drawn(self, impl):
        """tokens that come again at any distance, several times, or never"""
        for seed, values in enumerate((2, 5, 20, 60)):
            expect_induction(impl, f"of {values} tokens", *drawn_attention(2, 3, 17, seed, values))

    def test_sum(self, impl):
        """a token that came five times has five places to look at"""
        ids = torch.tensor([[7, 1, 7, 2, 7, 3, 7, 4, 7, 5, 7]])
        attention = drawn_attention(1, 2, 11, 3)[0]
        expect_induction(impl, "every second token the same", attention, ids)

    def test_the_same_in_a_row(self, impl):
        """where the token before is the same, the position itself is one of the places"""
        attention = drawn_attention(1, 2, 6, 4)[0]
        expect_induction(impl, "all the same", attention, torch.full((1, 6), 9))
        expect_induction(impl, "two in a row", attention, torch.tensor([[1, 2, 2, 3, 4, 5]]))

    def test_no_weight(self, impl):
        """a position counts if there is a place to look at, whether or not any head looks there"""
        ids = torch.randint(4, (2, 13), generator=torch.Generator().manual_seed(12))
        looks = (random_tensor(2, 3, 13, seed=13).abs() * 5).long() % torch.arange(1, 14)
        attention = torch.nn.functional.one_hot(looks, 13).float()
        expect_induction(impl, "heads that look at one position each", attention, ids)
        expect_induction(impl, "heads that look nowhere", torch.zeros(2, 3, 13, 13), ids)

    def test_first(self, impl):
        """position 0 came after nothing"""
        attention = torch.zeros(1, 1, 3, 3)
        attention[..., 0] = 1
        expect_induction(impl, "all look at the first", attention, torch.tensor([[1, 2, 1]]))

    def test_mean_over_positions(self, impl):
        """each position alike, however many a text has"""
        attention, ids = drawn_attention(3, 2, 12, 5, 50)
        ids[0], ids[1] = 3, torch.arange(12)
        expect_induction(impl, "texts with many, none and some", attention, ids)

    def test_heads(self, impl):
        """each head by itself, one or many, as many as texts or positions, or not"""
        for b, h, t in ((1, 1, 9), (2, 12, 5), (4, 3, 8), (1, 2, 1), (2, 6, 6), (6, 2, 6), (5, 5, 5)):
            expect_induction(impl, f"[{b}, {h}, {t}, {t}]", *drawn_attention(b, h, t, b + h))

    def test_none(self, impl):
        """no token comes again: 0, not NaN"""
        attention = drawn_attention(2, 3, 6, 6)[0]
        expect_induction(impl, "all different", attention, torch.arange(12).view(2, 6))
        expect_induction(impl, "texts of one token", attention, torch.ones(2, 6, dtype=torch.int64), [1, 1])
        expect_induction(impl, "texts of no token", attention, torch.ones(2, 6, dtype=torch.int64), [0, 0])

    def test_future(self, impl):
        """only what came: weights ahead of a position do not count"""
        attention = random_tensor(1, 2, 9, 9, seed=7).softmax(-1)
        expect_induction(impl, "without a causal mask", attention, torch.tensor([[1, 2, 1, 3, 2, 1, 4, 4, 2]]))

    def test_lengths(self, impl):
        """padding does not count, be it NaN, or like the text"""
        attention, ids = drawn_attention(3, 2, 12, 8, 4)
        expect_induction(impl, "padding like text", attention, ids, [12, 5, 9])
        expect_induction(impl, "lengths=None", attention, ids, None)
        for row, length in enumerate((12, 5, 9)):
            ids[row, length:] = ids[row, 0]
        expected = induction_by_hand(attention, ids, [12, 5, 9])
        for row, length in enumerate((12, 5, 9)):
            attention[row, :, length:] = math.nan
            attention[row, :, :, length:] = math.nan
        expect_close("padding of NaN", impl(attention, ids, [12, 5, 9]), expected, atol=1e-5)

    def test_large(self, impl):
        """long texts, tokens with large numbers"""
        attention, ids = drawn_attention(1, 2, 180, 11, 90)
        expect_induction(impl, "180 tokens", attention, ids * 256 + 49_000)
        expect_induction(impl, "tokens 65,536 apart", attention, ids % 45 + 65_536 * (ids >= 45))

    def test_half(self, impl):
        """fp16 and bf16 weights are added up in fp32; fp64 gives fp32"""
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            attention, ids = drawn_attention(8, 2, 64, 9, 3, dtype)
            expect_induction(impl, str(dtype), attention, ids)

    def test_input(self, impl):
        """attention and ids stay as they are, and need not be contiguous; ids may be int32"""
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
            attention, ids = drawn_attention(2, 3, 7, 10, dtype=dtype)
            kept, lengths = (attention.clone(), ids.clone()), [7, 4]
            impl(attention, ids, lengths)
            expect_kept(f"attention of {dtype}", attention, kept[0])
            expect_kept("ids", ids, kept[1])
            expect_equal("lengths after the call", lengths, [7, 4])
        expect_induction(impl, "not contiguous", spread(attention), spread(ids))
        expect_induction(impl, "int32", attention, ids.int())


# ---- 13.8


ESCAPED = set(b'"\\/bfnrt')


def string_beginning(data, most):
    """-> whether data begins a string of at most `most` characters, whether it is whole; byte by byte."""
    state, count, need, low, high = "start", 0, 0, 0x80, 0xBF
    for byte in data:
        if state == "start":
            if byte != 0x22:
                return False, False
            state = "in"
        elif state == "whole":
            return False, False
        elif state == "escape":
            if byte not in ESCAPED:
                return False, False
            state = "in"
        elif state == "part":
            if not low <= byte <= high:
                return False, False
            need, low, high = need - 1, 0x80, 0xBF
            state = "part" if need else "in"
        elif byte == 0x22:
            state = "whole"
        else:
            count += 1
            if byte == 0x5C:
                state = "escape"
            elif byte >= 0x80:
                need = 1 if 0xC2 <= byte <= 0xDF else 2 if 0xE0 <= byte <= 0xEF else 3 if 0xF0 <= byte <= 0xF4 else 0
                if not need:
                    return False, False
                low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
                    byte, (0x80, 0xBF)
                )
                state = "part"
            elif byte < 0x20:
                return False, False
    return count <= most, state == "whole" and count <= most


def expect_string(impl, text, tokens, end, most):
    got = impl(text, list(tokens), end, most)
    what = f"behind {text!r}, at most {most}"
    expect_tensor(what, got, torch.bool, (len(tokens),))
    for i, found in enumerate(got.tolist()):
        token = tokens[i]
        expected = (
            string_beginning(text, most)[1] if i == end else bool(token) and string_beginning(text + token, most)[0]
        )
        name = "the end token" if i == end else f"token {token!r}"
        expect(found == expected, f"{what}, {name}: expected {expected}\n  got {found}")


EMOJI, ACCENT = "😀".encode(), "é".encode()
PIECES = [
    b'"',
    b"a",
    b"ab",
    b"abc",
    b"\\",
    b"n",
    b'a"',
    b'"a',
    b'""',
    b"\\n",
    b'\\"',
    b"\\\\",
    b"\\x",
    b"/",
    b"u",
    b" ",
    b"\n",
    b"\x7f",
    None,
    b"",
]


@exercise("13.8", "string_mask")
class TestStringMask:
    def test_plain(self, impl):
        """a quote, characters, a quote, nothing behind it"""
        for text in (b"", b'"', b'"ab', b'"ab"', b'""'):
            expect_string(impl, text, PIECES, 18, 5)

    def test_end(self, impl):
        """the end token behind the closing quote, not behind the first one, nor an escaped one"""
        for text in (
            b"",
            b'"',
            b'"a',
            b'"a\\',
            b'"a\\"',
            b'"a\\\\',
            b'"a\\\\"',
            b'"\\"',
            b'"\\""',
            b'"\\\\\\"',
            b'""',
            b'"a"',
        ):
            for end in (18, 0, 19):
                expect_string(impl, text, PIECES, end, 9)

    def test_escapes(self, impl):
        """a backslash and one of "\\/bfnrt"""
        tokens = [bytes([b]) for b in range(256)] + [b"\\" + bytes([b]) for b in range(256)] + [None]
        for text in (b'"', b'"\\', b'"a\\\\', b'"a"'):
            expect_string(impl, text, tokens, 512, 9)

    def test_limit(self, impl):
        """at most `most` characters; quotes do not count, an escape counts as one, and so does its backslash alone"""
        for text in (b'"', b'"a', b'"ab', b'"\\n', b'"\\n\\', b'"\\"\\\\', b'"a\\"', b'"ab"'):
            for most in (2, 3):
                expect_string(impl, text, PIECES, 18, most)
        expect_string(impl, b'"', PIECES, 18, 0)
        expect_string(impl, b"", PIECES, 18, 0)
        expect_string(impl, b'"' + b"x" * 70, [b"x", b"xx", b'x"', b'"', None], 4, 71)
        long = [b"x" * 29, b"x" * 30, b"x" * 31, b"x" * 30 + b'"', b"\\n" * 30, b"\\n" * 31, ACCENT * 30, b'"', None]
        for count in (30, 1100):
            expect_string(impl, b'"' + b"x" * (count - 30), long, 8, count)

    def test_characters(self, impl):
        """a character of several bytes is one, and may come in parts"""
        tokens = [
            ACCENT,
            EMOJI,
            "日本".encode(),
            ACCENT + b'"',
            b"a",
            ACCENT[:1],
            ACCENT[1:],
            EMOJI[:1],
            EMOJI[:3],
            EMOJI[1:],
            EMOJI[3:],
            EMOJI[3:] + b'"',
            ACCENT[1:] + ACCENT[:1],
            b'"',
            "e\u0301".encode(),  # looks like é, and is two
            "\u0301".encode(),
            "\ue000\U000f0000".encode(),
            None,
        ]
        for text in (
            b'"',
            b'"a',
            b'"e',
            b'"' + ACCENT,
            b'"' + ACCENT[:1],
            b'"' + EMOJI[:1],
            b'"' + EMOJI[:3],
            b'"a' + EMOJI[:3],
            b'"a"',
            b"",
            b'"\\',
        ):
            for most in (1, 2, 3):
                expect_string(impl, text, tokens, len(tokens) - 1, most)

    def test_not_utf8(self, impl):
        """bytes that can become no character do not come"""
        tokens = [bytes([b]) for b in range(128, 256)]
        tokens += [
            bytes([a, b])
            for a in (0xC0, 0xC1, 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xF5)
            for b in (0x22, 0x61, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC3)
        ]
        tokens += [b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\xbd\xed\xb8\x80", b"\xf4\x90\x80\x80"]
        tokens += [b"\xf0\x80\x80\x80", b"\xf8\x88\x80\x80\x80", None]
        for text in (b'"', b'"a', b'"\xe0', b'"\xed', b'"\xf0', b'"\xf4', b'"\xe3\x81', b'"\xf0\x9f'):
            expect_string(impl, text, tokens, len(tokens) - 1, 5)

    def test_control(self, impl):
        """control characters below U+0020 do not come; DEL, line separators and a byte order mark do"""
        tokens = [
            chr(c).encode() for c in (*range(0x21), 0x7F, 0x80, 0x9F, 0xA0, 0x2028, 0xFEFF, 0xFFFD, 0xFFFF, 0x10FFFF)
        ] + [None]
        expect_string(impl, b'"', tokens, len(tokens) - 1, 3)
        expect_string(impl, b'"\xef\xbb', [b"\xbf", b'\xbf"', b'"', None], 3, 3)
        marks = [b"\xef\xbb\xbf", b'\xef\xbb\xbf"', b"\xef", b'"\xef\xbb\xbf', b'"', None]
        for text in (b"", b'"', b'"a"'):
            expect_string(impl, text, marks, 5, 3)

    def test_special(self, impl):
        """special tokens and tokens of no bytes never come; an end token's bytes do not count"""
        expect_string(impl, b'"', [None, b"", b"a", b"<|im_end|>", b"a", None], 3, 20)
        expect_string(impl, b'"a"', [None, b"", b"a", b"<|im_end|>", b"a", None], 3, 20)
        expect_string(impl, b"", [None, b"", b'"', b"<|im_end|>", None], 2, 20)

    def test_drawn(self, impl):
        """drawn strings, cut anywhere"""
        draw = random.Random(2)
        for _ in range(40):
            pieces = draw.choices(["a", "é", "日", "😀", "\\n", '\\"', "\\\\", " "], k=draw.randint(0, 6))
            whole = ('"' + "".join(pieces) + '"').encode()
            cut = draw.randint(0, len(whole))
            tokens = [whole[cut : cut + n] for n in range(8)] + [whole[cut : cut + 1] + b"!", *PIECES]
            expect_string(
                impl, whole[:cut], tokens, len(tokens) - 2, draw.choice((len(pieces), max(0, len(pieces) - 1), 20))
            )

    def test_input(self, impl):
        """tokens stay as they are"""
        tokens = list(PIECES)
        impl(b'"', tokens, 18, 5)
        expect_equal("tokens after the call", tokens, PIECES)
