"""Wrong and alternative implementations for the exercises of chapter 13: they keep the checks honest."""

import math
import re
import unicodedata
from collections import Counter, defaultdict

import torch

from minillm.learn.testing import alternative, wrong

# ---- 13.1


def one(message, strip=False):
    content = message["content"].strip() if strip else message["content"]
    return f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"


def chatter(
    first=lambda messages: bool(messages) and messages[0]["role"] == "system", given=lambda system: system is not None,
    one=one, opening="<|im_start|>assistant\n", goes_on=True, default=True, begin="", cut=None,
):  # fmt: skip
    """The right one; what is given is what can be wrong."""

    def chat(messages, system=None, generate=default):
        messages = list(messages)
        if given(system) and not first(messages):
            messages.insert(0, {"role": "system", "content": system})
        parts = [one(m) for m in messages]
        text = begin + "".join(parts)
        if not generate:
            return text
        if goes_on and messages and messages[-1]["role"] == "assistant":
            return cut(text) if cut else text[: -len("<|im_end|>\n")]
        return text + opening

    return chat


alternative("13.1", "message by message")(chatter())

for changes, why in (
    ({"one": lambda m: one(m, strip=True)}, "strips contents"),
    ({"one": lambda m: one(m).replace("<|im_end|>\n", "<|im_end|>", 1)}, "no line break behind a message"),
    ({"one": lambda m: one(m).replace("\n", " ", 1)}, "a space behind the role"),
    ({"one": lambda m: one(m) if m["content"] else ""}, "leaves out empty messages"),
    ({"one": lambda m: one(m) if m["role"] in ("system", "user", "assistant") else ""}, "knows three roles"),
    ({"one": lambda m: one({**m, "content": m["content"].replace("<|im_end|>", "")})}, "takes marks out of contents"),
    ({"begin": "<|im_start|>"}, "a token of its own at the beginning"),
    ({"begin": "<s>"}, "<s> at the beginning"),
    ({"opening": ""}, "does not open the answer"),
    ({"opening": "<|im_start|>assistant"}, "opens the answer without its line break"),
    ({"opening": "<|im_start|>assistant\n "}, "opens the answer with a space"),
    ({"goes_on": False}, "closes the beginning of an answer"),
    ({"default": False}, "generate is False unless given"),
    ({"given": bool}, "takes an empty system for none"),
    ({"given": lambda system: False}, "ignores system"),
    ({"first": lambda messages: False}, "always puts the system in front"),
    ({"first": lambda messages: any(m["role"] == "system" for m in messages)}, "takes a later system for the first"),
    ({"first": lambda messages: not messages or messages[0]["role"] == "system"}, "no system without messages"),
    ({"first": lambda m: bool(m) and m[0] == {"role": "system", "content": "Own."}}, "knows one system"),
    ({"cut": lambda text: text.rstrip("<|im_end>\n")}, "strips letters of the mark from the answer"),
    ({"cut": lambda text: text.replace("<|im_end|>\n", "")}, "takes every mark off"),
    ({"cut": lambda text: text[: text.index("<|im_end|>\n", text.rindex("<|im_start|>"))]}, "cuts at the first mark"),
    ({"first": lambda m: bool(m) and m[0]["role"] in ("system", "developer")}, "takes a developer for the system"),
    ({"first": lambda m: bool(m) and m[0]["role"].lower() == "system"}, "a system in capitals"),
    ({"cut": lambda text: text[: -len("<|im_end|>\n")].rstrip()}, "white space behind the beginning of an answer goes"),
    ({"cut": lambda text: text[: -len("\n")]}, "leaves <|im_end|> behind the beginning of an answer"),
):
    wrong("13.1", why)(chatter(**changes))

for change, why in (
    (lambda text: unicodedata.normalize("NFC", text), "puts accents and letters together"),
    (lambda text: text.replace("\r\n", "\n"), "line breaks of one kind"),
    (lambda text: text.split("</think>")[-1].lstrip("\n") if "</think>" in text else text, "leaves out thoughts"),
    (lambda text: text.replace("\0", ""), "leaves out NUL"),
    (lambda text: text.replace("\t", "    "), "tabs become spaces"),
    (lambda text: text.replace("\\n", "\n"), "a backslash and n become a line break"),
    (lambda text: text if text.strip() else "", "white space alone is nothing"),
):
    wrong("13.1", why)(chatter(one=lambda m, change=change: one({**m, "content": change(m["content"])})))


@wrong("13.1", "the beginning is followed by another opening")
def chat(messages, system=None, generate=True):
    text = chatter()(messages, system, generate)
    return text + "<|im_start|>assistant\n" if generate and not text.endswith("assistant\n") else text


@wrong("13.1", "replaces the conversation's own system")
def chat(messages, system=None, generate=True):
    own = messages and messages[0]["role"] == "system"
    return chatter()(messages[1:] if own and system is not None else messages, system, generate)


@wrong("13.1", "puts the system into the caller's list")
def chat(messages, system=None, generate=True):
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return chatter()(messages, None, generate)


@wrong("13.1", "takes the beginning of the answer off the caller's list")
def chat(messages, system=None, generate=True):
    text = chatter()(messages, system, generate)
    if generate and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return text


@wrong("13.1", "goes on without generate, too")
def chat(messages, system=None, generate=True):
    text = chatter()(messages, system, generate)
    last = messages and messages[-1]["role"] == "assistant"
    return text.removesuffix("<|im_end|>\n") if last else text


@wrong("13.1", "a conversation of nothing fails")
def chat(messages, system=None, generate=True):
    messages[0]["role"]
    return chatter()(messages, system, generate)


@wrong("13.1", "leaves out a message that came before")
def chat(messages, system=None, generate=True):
    seen = list({m["content"]: m for m in messages}.values())
    return chatter()(seen, system, generate)


@wrong("13.1", "roles in small letters")
def chat(messages, system=None, generate=True):
    return chatter()([{**m, "role": m["role"].lower()} for m in messages], system, generate)


@wrong("13.1", "the content stands behind the role in each message")
def chat(messages, system=None, generate=True):
    return chatter(one=lambda m: "<|im_start|>{}\n{}<|im_end|>\n".format(*m.values()))(messages, system, generate)


@wrong("13.1", "makes one message of two of the assistant's")
def chat(messages, system=None, generate=True):
    joined = []
    for m in messages:
        if joined and m["role"] == joined[-1]["role"] == "assistant":
            joined[-1] = {**m, "content": joined[-1]["content"] + m["content"]}
        else:
            joined.append(m)
    return chatter()(joined, system, generate)


@wrong("13.1", "one system message alone")
def chat(messages, system=None, generate=True):
    kept = [m for i, m in enumerate(messages) if m["role"] != "system" or i == 0 or messages[i - 1]["role"] != "system"]
    return chatter()(kept, system, generate)


@wrong("13.1", "a tool's result opens no answer")
def chat(messages, system=None, generate=True):
    return chatter()(messages, system, generate and not (messages and messages[-1]["role"] == "tool"))


@wrong("13.1", "takes marks out of the system")
def chat(messages, system=None, generate=True):
    return chatter()(messages, system.replace("<|im_end|>", "") if system else system, generate)


@wrong("13.1", "an empty answer is no message")
def chat(messages, system=None, generate=True):
    last = messages and not generate and messages[-1] == {"role": "assistant", "content": ""}
    return chatter()(messages[:-1] if last else messages, system, generate)


@wrong("13.1", "no system in front of the assistant's message")
def chat(messages, system=None, generate=True):
    return chatter(first=lambda m: bool(m) and m[0]["role"] in ("system", "assistant"))(messages, system, generate)


@alternative("13.1", "from the end")
def chat(messages, system=None, generate=True):
    text = "" if messages and messages[-1]["role"] == "assistant" else "<|im_start|>assistant\n"
    end = "" if generate and not text else "<|im_end|>\n"
    text = text if generate else ""
    for m in reversed(messages):
        text, end = f"<|im_start|>{m['role']}\n{m['content']}{end}{text}", "<|im_end|>\n"
    if system is not None and not text.startswith("<|im_start|>system\n"):
        text = f"<|im_start|>system\n{system}<|im_end|>\n{text}"
    return text


# ---- 13.2


def scorer(rows=lambda logits, begin: logits[begin - 1 : -1], cast=lambda x: x.double(), least=1, most=0, reduce=None):
    """The right one; what is given is what can be wrong."""

    def label_score(logits, ids, begin, mean=False):
        if begin < least or begin >= len(ids) + most:
            raise ValueError("begin")
        p = torch.log_softmax(cast(rows(logits, begin)), -1)
        each = p[torch.arange(len(ids) - begin), torch.tensor(ids[begin:])]
        if reduce:
            return reduce(each, mean)
        return (each.mean() if mean else each.sum()).item()

    return label_score


alternative("13.2", "by position")(scorer())
alternative("13.2", "in fp32")(scorer(cast=lambda x: x.float()))


@alternative("13.2", "one token after the other")
def label_score(logits, ids, begin, mean=False):
    if begin <= 0 or begin >= len(ids):
        raise ValueError("begin: expected a prompt and a label")
    total = 0.0
    for i in range(begin, len(ids)):
        row = logits[i - 1].to(torch.float64)
        total += float(row[ids[i]] - row.logsumexp(0))
    return total / (len(ids) - begin) if mean else total


for changes, why in (
    ({"rows": lambda logits, begin: logits[begin:]}, "row i for token i"),
    ({"rows": lambda logits, begin: logits[-(len(logits) - begin) :]}, "the last rows"),
    ({"rows": lambda logits, begin: logits[begin - 1 : begin].expand(len(logits) - begin, -1)}, "one row for all"),
    ({"cast": lambda x: x}, "in the dtype of the logits"),
    ({"cast": lambda x: x.half()}, "in fp16"),
    ({"cast": lambda x: x.nan_to_num(neginf=-1e4).float()}, "-inf is -10,000"),
    ({"least": 0}, "takes no prompt"),
    ({"most": 1}, "takes no label"),
    ({"reduce": lambda each, mean: float(each.sum())}, "ignores mean"),
    ({"reduce": lambda each, mean: float(each.mean())}, "always the mean"),
    ({"reduce": lambda each, mean: float(each.sum() if mean else each.mean())}, "mean the other way around"),
    ({"reduce": lambda each, mean: float(each[0])}, "the first token alone"),
    ({"reduce": lambda each, mean: float(each[-1])}, "the last token alone"),
    ({"reduce": lambda each, mean: float(each.exp().log().mean() if mean else each.exp().prod())}, "p instead of ln p"),
    ({"reduce": lambda each, mean: float(-(each.mean() if mean else each.sum()))}, "the loss"),
    ({"reduce": lambda each, mean: float((each.mean() if mean else each.sum()) / math.log(2))}, "in bits"),
    ({"reduce": lambda each, mean: each.mean() if mean else each.sum()}, "a tensor"),
    (
        {"reduce": lambda each, mean: float(each.clamp(min=-1e9).mean() if mean else each.clamp(min=-1e9).sum())},
        "never -inf",
    ),
    (
        {"reduce": lambda each, mean: float(each.exp().mean().log() if mean else each.sum())},
        "the logarithm of the mean p",
    ),
):
    wrong("13.2", why)(scorer(**changes))


@wrong("13.2", "raw logits")
def label_score(logits, ids, begin, mean=False):
    scorer()(logits, ids, begin, mean)
    each = [float(logits[i - 1, ids[i]]) for i in range(begin, len(ids))]
    return sum(each) / (len(each) if mean else 1)


@wrong("13.2", "softmax, then its logarithm")
def label_score(logits, ids, begin, mean=False):
    scorer()(logits, ids, begin, mean)
    p = torch.softmax(logits[begin - 1 : -1].float(), -1)
    each = p[torch.arange(len(ids) - begin), torch.tensor(ids[begin:])].clamp(min=1e-30).log()
    return float(each.mean() if mean else each.sum())


@wrong("13.2", "exponentials of what they are")
def label_score(logits, ids, begin, mean=False):
    scorer()(logits, ids, begin, mean)
    x = logits[begin - 1 : -1].float()
    each = (x - x.exp().sum(-1, keepdim=True).log())[torch.arange(len(ids) - begin), torch.tensor(ids[begin:])]
    return float(each.mean() if mean else each.sum())


@wrong("13.2", "the softmax over all rows together")
def label_score(logits, ids, begin, mean=False):
    scorer()(logits, ids, begin, mean)
    x = logits.double()
    p = x - x.flatten().logsumexp(0)
    each = p[torch.arange(begin - 1, len(ids) - 1), torch.tensor(ids[begin:])]
    return float(each.mean() if mean else each.sum())


@wrong("13.2", "divides by all tokens")
def label_score(logits, ids, begin, mean=False):
    return scorer()(logits, ids, begin) / (len(ids) if mean else 1)


@wrong("13.2", "the whole text")
def label_score(logits, ids, begin, mean=False):
    scorer()(logits, ids, begin, mean)
    return scorer()(logits, ids, 1, mean)


@wrong("13.2", "softmax in place")
def label_score(logits, ids, begin, mean=False):
    found = scorer()(logits, ids, begin, mean)
    logits -= logits.max(-1, keepdim=True).values
    return found


@wrong("13.2", "needs contiguous logits")
def label_score(logits, ids, begin, mean=False):
    return scorer()(logits.view(-1).view(logits.shape), ids, begin, mean)


@wrong("13.2", "an empty label's score is 0")
def label_score(logits, ids, begin, mean=False):
    return 0.0 if begin >= len(ids) else scorer()(logits, ids, begin, mean)


@wrong("13.2", "128 tokens of a label at most")
def label_score(logits, ids, begin, mean=False):
    end = min(len(ids), begin + 128)
    return scorer()(logits[:end], ids[:end], begin, mean)


@wrong("13.2", "begin -1 is the last token")
def label_score(logits, ids, begin, mean=False):
    return scorer()(logits, ids, begin % len(ids) if begin < 0 else begin, mean)


@wrong("13.2", "softmax in place, of fp64 alone")
def label_score(logits, ids, begin, mean=False):
    found = scorer()(logits, ids, begin, mean)
    x = logits.double()
    x -= x.amax(-1, keepdim=True)
    return found


@wrong("13.2", "-inf of other tokens is -10,000")
def label_score(logits, ids, begin, mean=False):
    own = scorer()(logits, ids, begin, mean)
    return (
        own if own == -math.inf else scorer(cast=lambda x: x.double().nan_to_num(neginf=-1e4))(logits, ids, begin, mean)
    )


@wrong("13.2", "a label ends at token 0")
def label_score(logits, ids, begin, mean=False):
    end = next((i + 1 for i in range(max(begin, 0), len(ids)) if ids[i] == 0), len(ids))
    return scorer()(logits[:end], ids[:end], begin, mean)


@wrong("13.2", "each token once")
def label_score(logits, ids, begin, mean=False):
    scorer()(logits, ids, begin, mean)
    each = {ids[i]: float(logits[i - 1].double().log_softmax(-1)[ids[i]]) for i in range(begin, len(ids))}
    return sum(each.values()) / (len(ids) - begin if mean else 1)


@wrong("13.2", "a mean of three or more")
def label_score(logits, ids, begin, mean=False):
    return scorer()(logits, ids, begin, mean and len(ids) - begin > 2)


@alternative("13.2", "a cross-entropy")
def label_score(logits, ids, begin, mean=False):
    if not 0 < begin < len(ids):
        raise ValueError("begin: expected a prompt and a label")
    target = torch.tensor(ids)[begin:]
    reduction = "mean" if mean else "sum"
    return -torch.nn.functional.cross_entropy(logits[begin - 1 : -1].float(), target, reduction=reduction).item()


# ---- 13.3


def pieces(template):
    return template.removesuffix("{label}").split("{text}")


def builder(
    keep=lambda shot, text: shot[0] != text, labels=lambda left: list(dict.fromkeys(label for _, label in left)),
    share=lambda count, n, i: count // n + (i < count % n), within=lambda found: found,
    order=lambda at: sorted(at)[::-1],
    end=lambda text, tail: text + tail.rstrip(), fill=lambda head, x, tail, label: head + x + tail + label,
    short=True, joined=lambda parts, separator: separator.join(parts),
):  # fmt: skip
    """The right one; what is given is what can be wrong."""

    def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
        left, chosen = [shot for shot in pool if keep(shot, text)], []
        names = labels(left)
        for i, label in enumerate(names):
            wanted = share(count, len(names), i)
            found = within([at for at, shot in enumerate(left) if shot[1] == label])
            if short and len(found) < wanted:
                raise ValueError("pool: too few")
            chosen += found[:wanted]
        if short and count and not names:
            raise ValueError("pool: too few")
        head, tail = pieces(template)
        parts = [fill(head, *left[at][:1], tail, left[at][1]) for at in order(chosen)]
        return joined([*parts, head + end(text, tail)], separator)

    return few_shot


@alternative("13.3", "turn by turn")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    head, tail = pieces(template)
    queues = defaultdict(list)
    for at, (x, label) in enumerate(pool):
        if x != text:
            queues[label].append(at)
    chosen, turn, names = [], 0, list(queues)
    while len(chosen) < count:
        if not names or turn // len(names) >= len(queues[names[turn % len(names)]]):
            raise ValueError("pool: expected more examples")
        chosen.append(queues[names[turn % len(names)]][turn // len(names)])
        turn += 1
    parts = [f"{head}{pool[at][0]}{tail}{pool[at][1]}" for at in sorted(chosen, key=lambda at: -at)]
    return separator.join([*parts, head + text + tail.rstrip()])


for changes, why in (
    ({"keep": lambda shot, text: True}, "the text itself may be an example"),
    ({"keep": lambda shot, text: shot[0].strip().lower() != text.strip().lower()}, "leaves out what is like the text"),
    ({"keep": lambda shot, text: text not in shot[0]}, "leaves out what contains the text"),
    ({"labels": lambda left: sorted({label for _, label in left})}, "labels by name"),
    (
        {"labels": lambda left: [name for name, _ in Counter(label for _, label in left).most_common()]},
        "labels by how many",
    ),
    ({"share": lambda count, n, i: count // n}, "leaves the rest out"),
    ({"share": lambda count, n, i: -(-count // n)}, "rounds up"),
    ({"share": lambda count, n, i: count // n + (n - 1 - i < count % n)}, "the last labels have one more"),
    ({"share": lambda count, n, i: count // n + (count % n if i == 0 else 0)}, "the first label has all of the rest"),
    ({"share": lambda count, n, i: count}, "count of each label"),
    ({"within": lambda found: found[::-1]}, "of a label the least similar"),
    ({"order": sorted}, "the most similar first"),
    ({"order": lambda at: at}, "label by label"),
    ({"order": lambda at: at[::-1]}, "label by label, from the last"),
    ({"end": lambda text, tail: text + tail}, "white space at the end"),
    ({"end": lambda text, tail: (text + tail).rstrip()}, "strips the text, too"),
    ({"end": lambda text, tail: text + tail.rstrip(" ")}, "strips spaces, no tabs and line breaks"),
    ({"end": lambda text, tail: text + tail.removesuffix(" ")}, "strips one space"),
    ({"end": lambda text, tail: text + tail.strip()}, "strips both sides"),
    ({"end": lambda text, tail: text + (tail[:-1] if tail else tail)}, "cuts one character"),
    ({"end": lambda text, tail: text.strip() + tail.rstrip()}, "strips the text"),
    ({"end": lambda text, tail: text.replace("{{", "{") + tail.rstrip()}, "two braces become one"),
    ({"keep": lambda shot, text: text not in shot}, "leaves out a label that is the text"),
    ({"fill": lambda head, x, tail, label: head + x.strip() + tail + label}, "strips the examples' texts"),
    ({"fill": lambda head, x, tail, label: head + x + tail + label.strip()}, "strips labels"),
    ({"fill": lambda head, x, tail, label: head + x + tail.rstrip() + " " + label}, "always one space before a label"),
    ({"fill": lambda head, x, tail, label: head + x + tail.rstrip() + label}, "no white space in examples"),
    ({"short": False}, "takes fewer where there are too few"),
    ({"joined": lambda parts, separator: "\n\n".join(parts)}, "ignores the separator"),
    ({"joined": lambda parts, separator: separator.join(parts) + separator}, "a separator at the end"),
    ({"joined": lambda parts, separator: separator + separator.join(parts)}, "a separator at the beginning"),
    ({"joined": lambda parts, separator: separator.join(dict.fromkeys(parts))}, "each example once"),
):
    wrong("13.3", why)(builder(**changes))


@wrong("13.3", "labels of the whole pool")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    names = list(dict.fromkeys(label for _, label in pool))
    return builder(labels=lambda left: names)(pool, text, count, template, separator)


@wrong("13.3", "chooses, then leaves the text out")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    head, tail = pieces(template)
    whole = builder(keep=lambda shot, text: True)(pool, text, count, template, "\0")
    drop = {head + x + tail + label for x, label in pool if x == text}
    return separator.join([part for part in whole.split("\0") if part not in drop])


@wrong("13.3", "str.format")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    chosen = builder(joined=lambda parts, _: parts)(pool, text, count, "{text}\0{label}")
    parts = [template.format(text=x, label=label) for x, _, label in (part.partition("\0") for part in chosen[:-1])]
    return separator.join([*parts, template.removesuffix("{label}").rstrip().format(text=text)])


def replacing(label_first):
    def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
        chosen = builder(joined=lambda parts, _: parts)(pool, text, count, "{text}\0{label}")
        parts = []
        for part in chosen[:-1]:
            x, _, label = part.partition("\0")
            both = [("{text}", x), ("{label}", label)]
            filled = template
            for mark, value in both[::-1] if label_first else both:
                filled = filled.replace(mark, value)
            parts.append(filled)
        head, tail = pieces(template)
        return separator.join([*parts, head + text + tail.rstrip()])

    return few_shot


wrong("13.3", "replaces {text}, then {label}")(replacing(False))
wrong("13.3", "replaces {label}, then {text}")(replacing(True))


@wrong("13.3", "finds the label's place by the first {label}")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    head, tail = pieces(template)
    whole = builder()(pool, text, count, template, separator)
    last = (head + text + tail).split("{label}")[0].rstrip()
    return whole[: len(whole) - len(head + text + tail.rstrip())] + last


@wrong("13.3", "regular expressions read backslashes in texts")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    def fill(head, x, tail, label):
        return head + re.sub("X", x, "X") + tail + label

    return builder(fill=fill)(pool, text, count, template, separator)


@wrong("13.3", "another template by default")
def few_shot(pool, text, count, template="Input: {text}\nLabel:{label}", separator="\n\n"):
    return builder()(pool, text, count, template, separator)


@wrong("13.3", "its own template, always")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    return builder()(pool, text, count, "Input: {text}\nLabel: {label}", separator)


@wrong("13.3", "no prompt without examples")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    if not pool:
        raise ValueError("pool: expected examples")
    return builder()(pool, text, count, template, separator)


@wrong("13.3", "takes the text out of the caller's pool")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    pool[:] = [shot for shot in pool if shot[0] != text]
    return builder()(pool, text, count, template, separator)


@wrong("13.3", "KeyError where a label has too few")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    try:
        return builder()(pool, text, count, template, separator)
    except ValueError as e:
        raise KeyError(str(e)) from None


@wrong("13.3", "the same text counts once")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    return builder()(list(dict(pool).items()), text, count, template, separator)


@wrong("13.3", "each label needs as many as the first")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    counts = Counter(label for x, label in pool if x != text)
    if counts and min(counts.values()) < -(-count // len(counts)):
        raise ValueError("pool: too few")
    return builder()(pool, text, count, template, separator)


@wrong("13.3", "labels in the order of the whole pool")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    def labels(left):
        there = {label for _, label in left}
        return [label for label in dict.fromkeys(label for _, label in pool) if label in there]

    return builder(labels=labels)(pool, text, count, template, separator)


@wrong("13.3", "places by the example, so that its double comes along")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    left = [shot for shot in pool if shot[0] != text]

    def order(chosen):
        taken = [left[at] for at in chosen]
        return [at for at in range(len(left) - 1, -1, -1) if left[at] in taken]

    return builder(order=order)(pool, text, count, template, separator)


@wrong("13.3", "labels whatever the case")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    said = {}
    plain = [(x, said.setdefault(label.lower(), label)) for x, label in pool]
    return builder()(plain, text, count, template, separator)


@wrong("13.3", "leaves out empty texts")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    return builder(keep=lambda shot, text: shot[0] not in (text, ""))(pool, text, count, template, separator)


@wrong("13.3", "leaves out empty labels")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    return builder(keep=lambda shot, text: shot[0] != text and shot[1])(pool, text, count, template, separator)


@wrong("13.3", "pools that are lists alone")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    return builder()(pool.copy(), text, count, template, separator)


@wrong("13.3", "strips the template's beginning")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    return builder()(pool, text, count, template.lstrip(), separator)


@alternative("13.3", "by the end of the template")
def few_shot(pool, text, count, template="Input: {text}\nLabel: {label}", separator="\n\n"):
    left = [(at, *shot) for at, shot in enumerate(pool) if shot[0] != text]
    room = Counter()
    names = list(dict.fromkeys(label for _, _, label in left))
    if count and not names:
        raise ValueError("pool: expected examples")
    for i in range(count):
        room[names[i % len(names)]] += 1
    prompt, blank = "", re.sub(r"\s*\{label\}$", "", template)
    for _, x, label in left:
        if room[label] > 0:
            room[label] -= 1
            prompt = re.sub(r"\{text\}", lambda _, x=x: x, template[: -len("{label}")]) + label + separator + prompt
    if room.total():
        raise ValueError("pool: expected more examples")
    return prompt + re.sub(r"\{text\}", lambda _: text, blank)


# ---- 13.4


def living(table, accepting, rounds=10_000):
    """Which states can be finished, bool [S]."""
    alive = accepting.clone()
    for _ in range(rounds):
        more = alive | ((table >= 0) & alive[table.clamp(min=0)]).any(1)
        if torch.equal(more, alive):
            break
        alive = more
    return alive


def masker(alive=living, walk=None, empty=False, special=None, ends=None):
    """The right one; what is given is what can be wrong."""

    def right_walk(table, state, token):
        for byte in token:
            if state < 0:
                return -1
            state = int(table[state, byte])
        return state

    def mask(table, accepting, state, tokens, end):
        good = alive(table, accepting)
        found = torch.zeros(len(tokens), dtype=torch.bool)
        for i, token in enumerate(tokens):
            if token is None and special is None:
                continue
            if token == b"" and not empty:
                continue
            after = (walk or right_walk)(table, state, token if token is not None else special)
            found[i] = after >= 0 and good[after]
        if ends:
            return ends(found, table, accepting, state, end)
        found[end] = accepting[state]
        return found

    return mask


alternative("13.4", "with tensors, round by round")(masker())


@alternative("13.4", "through a trie")
def mask(table, accepting, state, tokens, end):
    trie, alive = {}, living(table, accepting).tolist()
    for i, token in enumerate(tokens):
        if token and i != end:
            node = trie
            for byte in token:
                node = node.setdefault(byte, {})
            node.setdefault(-1, []).append(i)
    found, stack, moves = torch.zeros(len(tokens), dtype=torch.bool), [(trie, state)], table.tolist()
    while stack:
        node, at = stack.pop()
        for byte, below in node.items():
            if byte == -1:
                found[below] = alive[at]
            elif moves[at][byte] >= 0:
                stack.append((below, moves[at][byte]))
    found[end] = bool(accepting[state])
    return found


def wrapping(table, state, token):
    for byte in token:
        state = int(table[state, byte])
    return state


def first_byte(table, state, token):
    return int(table[state, token[0]]) if token else state


def skipping(table, state, token):
    for byte in token:
        state = int(table[state, byte]) if table[state, byte] >= 0 else state
    return state


def ascii_only(table, state, token):
    for byte in token:
        if state < 0 or byte >= 128:
            return -1
        state = int(table[state, byte])
    return state


def by_characters(table, state, token):
    for byte in token.decode(errors="ignore").encode():
        state = int(table[state, byte]) if state >= 0 else -1
    return state


def whole_characters(table, state, token):
    try:
        token.decode()
    except UnicodeDecodeError:
        return -1
    for byte in token:
        state = int(table[state, byte]) if state >= 0 else -1
    return state


def latin(table, state, token):
    for c in token.decode(errors="replace"):
        state = int(table[state, ord(c)]) if state >= 0 and ord(c) < 256 else -1
    return state


def without_nul(table, state, token):
    for byte in token.split(b"\x00")[0]:
        state = int(table[state, byte]) if state >= 0 else -1
    return state


def stripped(table, state, token):
    for byte in token.strip():
        state = int(table[state, byte]) if state >= 0 else -1
    return state


def cut(n):
    def walk(table, state, token):
        for byte in token[:n]:
            state = int(table[state, byte]) if state >= 0 else -1
        return state

    return walk


for changes, why in (
    ({"alive": lambda table, accepting: torch.ones(len(accepting), dtype=torch.bool)}, "any state will do"),
    ({"alive": lambda table, accepting: accepting}, "the text must be complete behind each token"),
    ({"alive": lambda table, accepting: (table >= 0).any(1) | accepting}, "a state with a way out will do"),
    ({"alive": lambda table, accepting: living(table, accepting, 1)}, "looks one byte ahead"),
    ({"alive": lambda table, accepting: living(table, accepting, 10)}, "looks ten bytes ahead"),
    ({"alive": lambda table, accepting: living(table, accepting, 100)}, "looks a hundred bytes ahead"),
    (
        {"alive": lambda table, accepting: accepting | (living(table, accepting, 1) & False) | accepting[table].any(1)},
        "-1 leads to the last state",
    ),
    ({"walk": wrapping}, "-1 is the last row"),
    ({"walk": first_byte}, "the first byte decides"),
    ({"walk": skipping}, "skips bytes that are not allowed"),
    ({"walk": ascii_only}, "bytes below 128 alone"),
    ({"walk": by_characters}, "drops parts of characters"),
    ({"walk": whole_characters}, "whole characters alone"),
    ({"walk": latin}, "characters' numbers instead of bytes"),
    ({"walk": without_nul}, "NUL ends a token"),
    ({"walk": stripped}, "strips tokens"),
    ({"walk": cut(4)}, "the first four bytes of a token"),
    ({"walk": cut(256)}, "the first 256 bytes of a token"),
    ({"empty": True}, "tokens of no bytes may come"),
    ({"special": b""}, "special tokens may come"),
    ({"ends": lambda found, table, accepting, state, end: found}, "the end token by its bytes"),
):
    wrong("13.4", why)(masker(**changes))


def with_end(value):
    def ends(found, table, accepting, state, end):
        found[end] = value(found, table, accepting, state)
        return found

    return ends


for value, why in (
    (lambda found, table, accepting, state: True, "the end token always"),
    (lambda found, table, accepting, state: False, "the end token never"),
    (
        lambda found, table, accepting, state: accepting[state] and not found.any(),
        "ends only where nothing else may come",
    ),
    (lambda found, table, accepting, state: accepting[state] or not found.any(), "ends where nothing else may come"),
    (lambda found, table, accepting, state: accepting.any(), "ends if some state accepts"),
    (lambda found, table, accepting, state: living(table, accepting)[state], "ends where the text could be finished"),
    (lambda found, table, accepting, state: not accepting[state], "ends where it may not"),
):
    wrong("13.4", why)(masker(ends=with_end(value)))


@wrong("13.4", "the end token is the last one")
def mask(table, accepting, state, tokens, end):
    return masker()(table, accepting, state, tokens, len(tokens) - 1)


@wrong("13.4", "the end token or its bytes")
def mask(table, accepting, state, tokens, end):
    by_bytes = masker(ends=lambda found, *_: found)(table, accepting, state, tokens, end)
    found = masker()(table, accepting, state, tokens, end)
    found[end] |= by_bytes[end]
    return found


@wrong("13.4", "from the first state")
def mask(table, accepting, state, tokens, end):
    return masker()(table, accepting, 0, tokens, end)


@wrong("13.4", "lists")
def mask(table, accepting, state, tokens, end):
    return masker()(table, accepting, state, tokens, end).tolist()


@wrong("13.4", "numbers instead of truth values")
def mask(table, accepting, state, tokens, end):
    return masker()(table, accepting, state, tokens, end).long()


@wrong("13.4", "the tokens' numbers")
def mask(table, accepting, state, tokens, end):
    return masker()(table, accepting, state, tokens, end).nonzero()[:, 0]


@wrong("13.4", "what must not come")
def mask(table, accepting, state, tokens, end):
    return ~masker()(table, accepting, state, tokens, end)


@wrong("13.4", "writes into the caller's table")
def mask(table, accepting, state, tokens, end):
    found = masker()(table, accepting, state, tokens, end)
    table[table < 0] = -2
    return found


@wrong("13.4", "spreads life into the caller's accepting")
def mask(table, accepting, state, tokens, end):
    found = masker()(table, accepting, state, tokens, end)
    accepting |= living(table, accepting)
    return found


@wrong("13.4", "each text of bytes once")
def mask(table, accepting, state, tokens, end):
    found, seen = masker()(table, accepting, state, tokens, end), set()
    for i, token in enumerate(tokens):
        if i != end and token in seen:
            found[i] = False
        seen.add(token)
    return found


@wrong("13.4", "alive are states from which the last one is reached")
def mask(table, accepting, state, tokens, end):
    return masker(alive=lambda table, ends: living(table, torch.arange(len(ends)) == len(ends) - 1))(
        table, accepting, state, tokens, end
    )


@wrong("13.4", "alive by one pass from the last state to the first")
def mask(table, accepting, state, tokens, end):
    def one_pass(table, accepting):
        alive = accepting.clone()
        for at in range(len(table) - 1, -1, -1):
            row = table[at]
            alive[at] |= alive[row[row >= 0]].any()
        return alive

    return masker(alive=one_pass)(table, accepting, state, tokens, end)


@wrong("13.4", "alive by printable bytes")
def mask(table, accepting, state, tokens, end):
    return masker(alive=lambda table, ends: living(table[:, 32:], ends))(table, accepting, state, tokens, end)


@wrong("13.4", "alive by bytes of ASCII")
def mask(table, accepting, state, tokens, end):
    return masker(alive=lambda table, ends: living(table[:, :128], ends))(table, accepting, state, tokens, end)


@wrong("13.4", "an end token written out comes as its bytes may")
def mask(table, accepting, state, tokens, end):
    found = masker()(table, accepting, state, tokens, end)
    if tokens[end] and tokens[end].startswith(b"<|"):
        found[end] |= masker()(table, accepting, state, [*tokens, None], len(tokens))[end]
    return found


@wrong("13.4", "takes the end token's bytes off the caller's list")
def mask(table, accepting, state, tokens, end):
    found = masker()(table, accepting, state, tokens, end)
    tokens[end] = None
    return found


@alternative("13.4", "backwards from the end")
def mask(table, accepting, state, tokens, end):
    into = defaultdict(set)
    for at, byte in (table >= 0).nonzero().tolist():
        into[int(table[at, byte])].add(at)
    alive, left = set(), accepting.nonzero().flatten().tolist()
    while left:
        at = left.pop()
        if at not in alive:
            alive.add(at)
            left += into[at]

    def comes(token):
        at = state
        for byte in token:
            at = int(table[at, byte])
            if at not in alive:  # -1 is not
                return False
        return len(token) > 0

    return torch.tensor([bool(accepting[state]) if i == end else comes(t or b"") for i, t in enumerate(tokens)])


# ---- 13.5


def calibrator(
    even=lambda x: x.double().softmax(1), mean=lambda p: p.mean(0), divide=lambda p, q: p / q,
    again=lambda p: p / p.sum(1, keepdim=True), cast=lambda x: x.float(), number=lambda classes: max(classes) + 1,
):  # fmt: skip
    """The right one; what is given is what can be wrong."""

    def calibrated(scores, empty, classes):
        p = again(divide(even(scores), mean(even(empty))))
        found = torch.zeros(len(scores), number(classes), dtype=p.dtype)
        return cast(found.index_add(1, torch.tensor(classes), p))

    return calibrated


alternative("13.5", "with probabilities, in fp64")(calibrator())


@alternative("13.5", "in logarithms, by a matrix of ones")
def calibrated(scores, empty, classes):
    q = torch.logsumexp(empty.float().log_softmax(1), 0) - math.log(len(empty))
    p = (scores.float() - q).softmax(1)
    return p @ torch.nn.functional.one_hot(torch.tensor(classes)).float()


for changes, why in (
    ({"even": lambda x: x.double().exp()}, "does not divide by the words' sum"),
    ({"even": lambda x: x.double().exp() / x.double().exp().sum(1, keepdim=True)}, "exponentials of -2000"),
    ({"even": lambda x: x.double().softmax(0)}, "over the prompts"),
    ({"even": lambda x: x.softmax(1)}, "in the dtype of the scores"),
    ({"even": lambda x: x.double()}, "scores are taken for probabilities"),
    ({"even": lambda x: x.double().softmax(1).clamp(min=1e-6)}, "p of a millionth at least"),
    ({"mean": lambda p: p.log().mean(0).exp()}, "the mean of logarithms"),
    ({"mean": lambda p: p[0]}, "the first empty prompt alone"),
    ({"mean": lambda p: p.sum(0) * 0 + 1}, "ignores the empty prompts"),
    ({"mean": lambda p: p.median(0).values}, "the median"),
    ({"mean": lambda p: p.amax(0)}, "the largest"),
    ({"divide": lambda p, q: p * q}, "multiplies"),
    ({"divide": lambda p, q: (p - q).clamp(min=0) + 1e-9}, "subtracts"),
    ({"divide": lambda p, q: p / (q + 1e-3)}, "adds a thousandth to the divisor"),
    ({"divide": lambda p, q: p / q.sqrt()}, "half of it"),
    ({"again": lambda p: p}, "rows do not add up to 1"),
    ({"again": lambda p: p.softmax(1)}, "a softmax of the quotients"),
    ({"again": lambda p: p / p.sum()}, "all rows add up to 1"),
    ({"again": lambda p: p / p.sum(0)}, "columns add up to 1"),
    ({"cast": lambda x: x}, "fp64"),
    ({"cast": lambda x: x.log().float()}, "logarithms"),
    ({"cast": lambda x: x.flip(1).float()}, "classes the other way around"),
    ({"cast": lambda x: x.argmax(1)}, "the likeliest class"),
    ({"number": lambda classes: len(set(classes)) + 1}, "a class too many"),
    ({"number": lambda classes: len(classes)}, "as many classes as words"),
):
    wrong("13.5", why)(calibrator(**changes))


@wrong("13.5", "the empty prompts' mean over scores")
def calibrated(scores, empty, classes):
    return calibrator(mean=lambda p: p)(scores, empty.double().mean(0, keepdim=True), classes)


@wrong("13.5", "adds up words, then calibrates")
def calibrated(scores, empty, classes):
    def classed(x):
        p = x.double().softmax(1)
        return torch.zeros(len(x), max(classes) + 1, dtype=p.dtype).index_add(1, torch.tensor(classes), p)

    p = classed(scores) / classed(empty).mean(0)
    return (p / p.sum(1, keepdim=True)).float()


@wrong("13.5", "the mean of a class's words")
def calibrated(scores, empty, classes):
    p = calibrator()(scores, empty, classes) / torch.bincount(torch.tensor(classes))
    return p / p.sum(1, keepdim=True)


@wrong("13.5", "the likeliest word of a class")
def calibrated(scores, empty, classes):
    p = calibrator()(scores, empty, list(range(len(classes))))
    of = torch.tensor(classes)
    return torch.stack([p[:, of == c].amax(1) for c in range(max(classes) + 1)], 1)


@wrong("13.5", "classes in the order in which they come")
def calibrated(scores, empty, classes):
    seen = list(dict.fromkeys(classes))
    return calibrator()(scores, empty, [seen.index(c) for c in classes])


@wrong("13.5", "a class's last word replaces the others")
def calibrated(scores, empty, classes):
    p = calibrator()(scores, empty, list(range(len(classes))))
    found = torch.zeros(len(scores), max(classes) + 1)
    for i, c in enumerate(classes):
        found[:, c] = p[:, i]
    return found


@wrong("13.5", "the empty prompts in their own proportion")
def calibrated(scores, empty, classes):
    q = empty.double().exp().sum(0) / empty.double().exp().sum()
    return calibrator(mean=lambda p: q)(scores, empty, classes)


@wrong("13.5", "0 times infinity is NaN")
def calibrated(scores, empty, classes):
    p = scores.double().log_softmax(1)
    p = torch.softmax(p - (p.exp() * 0 + 1) * empty.double().softmax(1).mean(0).log(), 1)
    p = p.exp().log()
    mixed = p @ torch.nn.functional.one_hot(torch.tensor(classes)).double()
    return torch.where(
        scores.isneginf().any(1, keepdim=True), (p * scores.double()).sum(1, keepdim=True), mixed
    ).float()


@wrong("13.5", "scores in place")
def calibrated(scores, empty, classes):
    found = calibrator()(scores, empty, classes)
    scores -= scores.logsumexp(1, keepdim=True)
    return found


@wrong("13.5", "empty in place")
def calibrated(scores, empty, classes):
    found = calibrator()(scores, empty, classes)
    empty.exp_()
    return found


@wrong("13.5", "sixteen classes at most")
def calibrated(scores, empty, classes):
    return calibrator()(scores, empty, classes)[:, :16]


@wrong("13.5", "needs contiguous scores")
def calibrated(scores, empty, classes):
    return calibrator()(scores.view(-1).view(scores.shape), empty, classes)


@wrong("13.5", "scores and empty in place, of fp64 alone")
def calibrated(scores, empty, classes):
    found = calibrator()(scores, empty, classes)
    for x in (scores.double(), empty.double()):
        x -= x.amax(1, keepdim=True)
    return found


@wrong("13.5", "-inf is -50")
def calibrated(scores, empty, classes):
    return calibrator()(scores.double().nan_to_num(neginf=-50.0), empty, classes)


@wrong("13.5", "-inf is -1,500")
def calibrated(scores, empty, classes):
    return calibrator()(scores.double().nan_to_num(neginf=-1500.0), empty, classes)


@wrong("13.5", "sorts the caller's classes")
def calibrated(scores, empty, classes):
    found = calibrator()(scores, empty, classes)
    if isinstance(classes, list):
        classes.sort()
    return found


@wrong("13.5", "each prompt by its own empty one where there are as many")
def calibrated(scores, empty, classes):
    pairs = len(scores) == len(empty)
    return calibrator(mean=lambda p: p if pairs else p.mean(0))(scores, empty, classes)


@alternative("13.5", "with probabilities, in fp32")
def calibrated(scores, empty, classes):
    return calibrator(even=lambda x: x.float().softmax(1))(scores, empty, classes)


@alternative("13.5", "each row's sum last")
def calibrated(scores, empty, classes):
    x = scores.float() - empty.float().softmax(1).mean(0).log()
    p = (x - x.amax(1, keepdim=True)).exp()
    found = torch.stack([p[:, [i for i, c in enumerate(classes) if c == k]].sum(1) for k in range(max(classes) + 1)], 1)
    return found / found.sum(1, keepdim=True)


# ---- 13.6


def pairer(value=None, each=None, spread=None, z=1.96, one=None, n=len, check=True, ends=None):
    """The right one; what is given is what can be wrong."""

    def paired(a, b, texts):
        if check and (len(a) != len(b) or len(a) != len(texts) or len(a) == 0):
            raise ValueError("texts: expected as many as answers")
        groups = defaultdict(list)
        for x, y, text in zip(a, b, texts, strict=False):
            groups[text].append((value or (lambda x, y: float(x) - float(y)))(x, y))
        found = (each or (lambda groups: [math.fsum(d) / len(d) for d in groups.values()]))(groups)
        mean = math.fsum(found) / len(found)
        if len(found) == 1:
            return one(mean) if one else (mean, -math.inf, math.inf)
        s = (spread or (lambda d, m: math.sqrt(math.fsum((x - m) ** 2 for x in d) / (len(d) - 1))))(found, mean)
        half = z * s / math.sqrt(n(found))
        return ends(mean, half) if ends else (mean, mean - half, mean + half)

    return paired


alternative("13.6", "in plain Python")(pairer())


@alternative("13.6", "sorted by text, with tensors")
def paired(a, b, texts):
    if len({len(a), len(b), len(texts)}) > 1 or len(a) == 0:
        raise ValueError("a: expected as many as b and texts")
    names = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    d = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    at = torch.tensor([names[text] for text in texts])
    means = torch.zeros(len(names), dtype=torch.float64).index_add(0, at, d) / torch.bincount(at)
    half = 1.96 * means.std() / len(means) ** 0.5 if len(means) > 1 else torch.tensor(math.inf)
    return [float(means.mean()), float(means.mean() - half), float(means.mean() + half)]


def flat(groups):
    return [x for found in groups.values() for x in found]


for changes, why in (
    ({"value": lambda x, y: float(y) - float(x)}, "b - a"),
    ({"value": lambda x, y: abs(float(x) - float(y))}, "the size of differences"),
    ({"value": lambda x, y: float(bool(x)) - float(bool(y))}, "truth values alone"),
    ({"value": lambda x, y: float(torch.tensor(float(x)).float() - torch.tensor(float(y)).float())}, "in fp32"),
    ({"value": lambda x, y: float(torch.tensor(float(x)).half() - torch.tensor(float(y)).half())}, "in fp16"),
    ({"each": flat}, "takes questions for independent cases"),
    ({"each": lambda groups: [math.fsum(d) for d in groups.values()]}, "a text's sum"),
    ({"each": lambda groups: [d[0] for d in groups.values()]}, "a text's first question"),
    ({"each": lambda groups: [d[-1] for d in groups.values()]}, "a text's last question"),
    (
        {"each": lambda groups: [float(math.fsum(d) > 0) - float(math.fsum(d) < 0) for d in groups.values()]},
        "who wins a text",
    ),
    ({"each": lambda groups: [sorted(d)[len(d) // 2] for d in groups.values()]}, "a text's median"),
    (
        {"each": lambda groups: [x for x in (math.fsum(d) / len(d) for d in groups.values()) if x] or [0.0]},
        "texts that differ",
    ),
    ({"spread": lambda d, m: math.sqrt(math.fsum((x - m) ** 2 for x in d) / len(d))}, "n in the divisor"),
    ({"spread": lambda d, m: math.fsum((x - m) ** 2 for x in d) / (len(d) - 1)}, "the variance"),
    ({"spread": lambda d, m: math.sqrt(max(m * (1 - m), 0.0))}, "the formula of a share"),
    ({"spread": lambda d, m: math.sqrt(math.fsum(x * x for x in d) / (len(d) - 1))}, "does not take the mean off"),
    ({"z": 1.645}, "90 %"),
    ({"z": 2.0}, "two standard errors"),
    ({"z": 2.576}, "99 %"),
    ({"z": 1.0}, "one standard error"),
    ({"n": lambda d: 1}, "the deviation instead of the error"),
    ({"n": lambda d: len(d) - 1}, "the root of n - 1"),
    ({"one": lambda mean: (mean, mean, mean)}, "no width for one text"),
    ({"one": lambda mean: (mean, math.nan, math.nan)}, "NaN for one text"),
    ({"one": lambda mean: (mean, -1.0, 1.0)}, "from -1 to 1 for one text"),
    ({"check": False}, "takes what there is"),
    ({"ends": lambda mean, half: (mean, max(-1.0, mean - half), min(1.0, mean + half))}, "cuts the interval at 1"),
    ({"ends": lambda mean, half: (mean, mean - half / 2, mean + half / 2)}, "half as wide"),
    ({"ends": lambda mean, half: (mean, half, half)}, "the half width"),
    ({"ends": lambda mean, half: (mean, mean + half, mean - half)}, "high, low"),
    ({"ends": lambda mean, half: (mean, mean - half)}, "no upper end"),
    ({"ends": lambda mean, half: (round(mean, 2), round(mean - half, 2), round(mean + half, 2))}, "rounded"),
):
    wrong("13.6", why)(pairer(**changes))


@wrong("13.6", "the mean over questions")
def paired(a, b, texts):
    mean, low, high = pairer()(a, b, texts)
    over = math.fsum(float(x) - float(y) for x, y in zip(a, b, strict=True)) / len(a)
    return over, over - (mean - low), over + (high - mean)


@wrong("13.6", "the interval's n is that of the questions")
def paired(a, b, texts):
    return pairer(n=lambda d: len(a))(a, b, texts)


@wrong("13.6", "unpaired")
def paired(a, b, texts):
    mean, low, high = pairer()(a, b, texts)
    if math.isinf(low):
        return mean, low, high
    zeros = [0] * len(a)
    halves = [found[2] - found[0] for found in (pairer()(a, zeros, texts), pairer()(b, zeros, texts))]
    half = math.hypot(*halves)
    return mean, mean - half, mean + half


@wrong("13.6", "texts by what is printed")
def paired(a, b, texts):
    return pairer()(a, b, [str(text) for text in texts])


@wrong("13.6", "texts by name, whatever the case")
def paired(a, b, texts):
    return pairer()(a, b, [text.lower() if isinstance(text, str) else text for text in texts])


@wrong("13.6", "texts come one behind another")
def paired(a, b, texts):
    runs, number = [], 0
    for i, text in enumerate(texts):
        number += i > 0 and text != texts[i - 1]
        runs.append(number)
    return pairer()(a, b, runs)


@wrong("13.6", "texts can be sorted")
def paired(a, b, texts):
    order = sorted(range(len(texts)), key=lambda i: texts[i])
    if len(a) != len(texts) or len(b) != len(texts):
        raise ValueError("lengths")
    return pairer()([a[i] for i in order], [b[i] for i in order], [texts[i] for i in order])


@wrong("13.6", "texts are numbers from 0")
def paired(a, b, texts):
    if not len(a) == len(b) == len(texts) or not len(a):
        raise ValueError("lengths")
    sums, counts = [0.0] * (max(texts) + 1), [0] * (max(texts) + 1)
    for x, y, text in zip(a, b, texts, strict=True):
        sums[text] += float(x) - float(y)
        counts[text] += 1
    return pairer()(
        [s / c for s, c in zip(sums, counts, strict=True) if c],
        [0] * sum(map(bool, counts)),
        range(sum(map(bool, counts))),
    )


@wrong("13.6", "subtracts truth values as they are")
def paired(a, b, texts):
    return pairer(value=lambda x, y: float(x - y))(a, b, texts)


@wrong("13.6", "lists alone")
def paired(a, b, texts):
    if not a or not b:
        raise ValueError("a: expected answers")
    return pairer()(a, b, texts)


@wrong("13.6", "takes answers off the lists")
def paired(a, b, texts):
    found = pairer()(a, b, texts)
    if isinstance(texts, list):
        texts.sort(key=str)
    return found


@wrong("13.6", "drops the last where lengths differ")
def paired(a, b, texts):
    n = min(len(a), len(b), len(texts))
    return pairer()(a[:n], b[:n], texts[:n])


@wrong("13.6", "texts by their hash")
def paired(a, b, texts):
    return pairer()(a, b, [hash(text) for text in texts])


@wrong("13.6", "texts by how they are written")
def paired(a, b, texts):
    return pairer()(a, b, [repr(text) for text in texts])


@wrong("13.6", "texts by kind and name")
def paired(a, b, texts):
    return pairer()(a, b, [(type(text), text) for text in texts])


@wrong("13.6", "fp64 of tensors in fp32")
def paired(a, b, texts):
    return pairer()(torch.as_tensor(a).float().tolist(), torch.as_tensor(b).float().tolist(), texts)


@wrong("13.6", "texts without white space around")
def paired(a, b, texts):
    return pairer()(a, b, [text.strip() if isinstance(text, str) else text for text in texts])


@wrong("13.6", "None is the empty text")
def paired(a, b, texts):
    return pairer()(a, b, ["" if text is None else text for text in texts])


@wrong("13.6", "texts by the first part of their name")
def paired(a, b, texts):
    return pairer()(a, b, [text[0] if isinstance(text, tuple) else text for text in texts])


@alternative("13.6", "one text after the other")
def paired(a, b, texts):
    if len(a) != len(texts) or len(b) != len(texts) or len(texts) < 1:
        raise ValueError("texts: expected as many as answers")
    n, mean, squares = 0, 0.0, 0.0
    for text in dict.fromkeys(texts):
        at = [i for i, other in enumerate(texts) if other == text]
        d = sum(float(a[i]) - float(b[i]) for i in at) / len(at)
        n, off = n + 1, d - mean
        mean += off / n
        squares += off * (d - mean)
    half = 1.96 * (squares / (n - 1) / n) ** 0.5 if n > 1 else math.inf
    return mean, mean - half, mean + half


# ---- 13.7


def scored(
    places=lambda row, i: [j for j in range(1, i + 1) if row[j - 1] == row[i]], value=lambda w: w.sum(-1),
    least=1, cast=lambda x: x.float(), divide=None, ends=None, positions=lambda end: range(end),
):  # fmt: skip
    """The right one; what is given is what can be wrong."""

    def induction(attention, ids, lengths=None):
        b, h, t, _ = attention.shape
        total, count = torch.zeros(h), 0
        lengths = [t] * b if lengths is None else lengths
        for row in range(b):
            tokens = ids[row].tolist()
            for i in positions(lengths[row] if ends is None else ends(t)):
                found = places(tokens, i)
                if len(found) >= least:
                    count += 1
                    if found:
                        total = total + value(cast(attention[row, :, i, found]))
        return total / (divide(b, t, count) if divide else max(count, 1))

    return induction


alternative("13.7", "position by position")(scored())


@alternative("13.7", "by an einsum")
def induction(attention, ids, lengths=None):
    b, t = ids.shape
    after = torch.zeros(b, t, t)
    for row in range(b):
        for i in range(t if lengths is None else lengths[row]):
            for j in range(1, i + 1):
                after[row, i, j] = ids[row, j - 1] == ids[row, i]
    total = torch.einsum("bhij,bij->h", attention.float().nan_to_num(), after)
    count = (after.sum(-1) > 0).sum()
    return total / count if count else torch.zeros(attention.shape[1])


for changes, why in (
    (
        {"places": lambda row, i: [j for j in range(i) if row[j] == row[i]]},
        "the same token instead of the one after it",
    ),
    ({"places": lambda row, i: [j for j in range(1, i) if row[j - 1] == row[i]]}, "never the position itself"),
    ({"places": lambda row, i: [j for j in range(1, i + 1) if row[j - 1] == row[i]][-1:]}, "the latest place alone"),
    ({"places": lambda row, i: [j for j in range(1, i + 1) if row[j - 1] == row[i]][:1]}, "the first place alone"),
    ({"places": lambda row, i: [j for j in range(1, len(row)) if row[j - 1] == row[i]]}, "places ahead count, too"),
    (
        {"places": lambda row, i: [j for j in range(i + 1) if row[j - 1] == row[i]]},
        "the first token comes after the last",
    ),
    (
        {"places": lambda row, i: [j for j in range(i + 1) if j + 1 < len(row) and row[j + 1] == row[i]]},
        "the token before the same",
    ),
    ({"places": lambda row, i: [i - 1] if i else []}, "the previous token"),
    (
        {"places": lambda row, i: [i - len(row) // 2 + 1] if i >= len(row) // 2 else []},
        "takes the tokens for two halves",
    ),
    ({"places": lambda row, i: [i] if row.count(row[i]) > 1 else []}, "the position itself"),
    ({"places": lambda row, i: [j for j in range(1, i + 1) if row[j - 1] == row[i] and i - j < 8]}, "looks eight back"),
    ({"value": lambda w: w.mean(-1)}, "the mean over places"),
    ({"value": lambda w: w.amax(-1)}, "the largest place"),
    ({"value": lambda w: (w.sum(-1) > 0.5).float()}, "counts positions above a half"),
    ({"value": lambda w: w.square().sum(-1)}, "squares"),
    ({"least": 0}, "every position counts"),
    ({"least": 2}, "positions with two places"),
    ({"cast": lambda x: x}, "sums in the dtype of the weights, then fp32"),
    ({"cast": lambda x: x.double()}, "fp64"),
    ({"divide": lambda b, t, count: b * t}, "divides by all positions"),
    ({"divide": lambda b, t, count: count}, "NaN where none counts"),
    ({"divide": lambda b, t, count: 1}, "the sum"),
    ({"divide": lambda b, t, count: b * (t // 2)}, "divides by half of the positions"),
    ({"ends": lambda t: t}, "ignores lengths"),
    ({"positions": lambda end: range(1, end - 1)}, "leaves the last position out"),
    ({"positions": lambda end: range(end // 2, end)}, "the second half alone"),
    ({"positions": lambda end: range(2, end)}, "begins at position 2"),
):
    wrong("13.7", why)(scored(**changes))


@wrong("13.7", "adds up in the dtype of the weights")
def induction(attention, ids, lengths=None):
    b, h, t, _ = attention.shape
    total, count = torch.zeros(h, dtype=attention.dtype), 0
    for row in range(b):
        for i in range(t if lengths is None else lengths[row]):
            found = [j for j in range(1, i + 1) if ids[row, j - 1] == ids[row, i]]
            if found:
                total, count = total + attention[row, :, i, found].sum(-1), count + 1
    return (total / max(count, 1)).float()


@wrong("13.7", "the mean of each text, then over texts")
def induction(attention, ids, lengths=None):
    lengths = [ids.shape[1]] * len(ids) if lengths is None else lengths
    return torch.stack(
        [scored()(attention[i : i + 1], ids[i : i + 1], lengths[i : i + 1]) for i in range(len(ids))]
    ).mean(0)


@wrong("13.7", "the first text alone")
def induction(attention, ids, lengths=None):
    return scored()(attention[:1], ids[:1], None if lengths is None else lengths[:1])


@wrong("13.7", "all texts as one")
def induction(attention, ids, lengths=None):
    b, h, t, _ = attention.shape
    flat, lengths = ids.flatten().tolist(), [t] * b if lengths is None else lengths
    total, count = torch.zeros(h), 0
    for row in range(b):
        for i in range(lengths[row]):
            if flat[row * t + i] in flat[: row * t + i]:
                found = [j for j in range(1, i + 1) if ids[row, j - 1] == ids[row, i]]
                total, count = total + attention[row, :, i, found].float().sum(-1), count + 1
    return total / max(count, 1)


@wrong("13.7", "looks from what is looked at")
def induction(attention, ids, lengths=None):
    return scored()(attention.transpose(2, 3), ids, lengths)


@wrong("13.7", "a score a text")
def induction(attention, ids, lengths=None):
    return torch.stack([scored()(attention[i : i + 1], ids[i : i + 1]) for i in range(len(ids))])


@wrong("13.7", "the mean over heads")
def induction(attention, ids, lengths=None):
    found = scored()(attention, ids, lengths)
    return found.mean().expand(len(found))


@wrong("13.7", "multiplies padding by 0")
def induction(attention, ids, lengths=None):
    t = ids.shape[1]
    ends = torch.tensor([t] * len(ids) if lengths is None else list(lengths))
    real = (torch.arange(t) < ends[:, None]).float()
    return scored()(attention * real[:, None, :, None], ids, lengths) + 0 * (attention * real[:, None, :, None]).sum()


@wrong("13.7", "the padding's value counts in the divisor")
def induction(attention, ids, lengths=None):
    found = scored()(attention, ids, lengths)
    if lengths is None:
        return found
    counts = [
        sum(any(row[j - 1] == row[i] for j in range(1, i + 1)) for row in ids.tolist() for i in range(ids.shape[1])),
        sum(
            any(row[j - 1] == row[i] for j in range(1, i + 1))
            for row, n in zip(ids.tolist(), lengths, strict=True)
            for i in range(n)
        ),
    ]
    return found * counts[1] / max(counts[0], 1)


@wrong("13.7", "sets padding to 0 in the caller's attention")
def induction(attention, ids, lengths=None):
    found = scored()(attention, ids, lengths)
    for row, end in enumerate(lengths or []):
        attention[row, :, end:] = 0
    return found


@wrong("13.7", "sets padding to -1 in the caller's ids")
def induction(attention, ids, lengths=None):
    found = scored()(attention, ids, lengths)
    for row, end in enumerate(lengths or []):
        ids[row, end:] = -1
    return found


@wrong("13.7", "needs contiguous weights")
def induction(attention, ids, lengths=None):
    return scored()(attention.view(-1).view(attention.shape), ids, lengths)


@wrong("13.7", "token numbers of 8 bits")
def induction(attention, ids, lengths=None):
    return scored()(attention, ids % 256, lengths)


@wrong("13.7", "128 positions at most")
def induction(attention, ids, lengths=None):
    return scored()(attention[:, :, :128, :128], ids[:, :128], lengths)


@wrong("13.7", "takes token 0 for padding")
def induction(attention, ids, lengths=None):
    return scored(places=lambda row, i: [j for j in range(1, i + 1) if row[i] and row[j - 1] == row[i]])(
        attention, ids, lengths
    )


def masked(attention, ids, lengths):
    """-> values [B, H, T], which positions count [B, T]"""
    t = ids.shape[1]
    after = torch.zeros(len(ids), t, t, dtype=torch.bool)
    after[:, :, 1:] = ids[:, :, None] == ids[:, None, :-1]
    after &= torch.ones(t, t, dtype=torch.bool).tril()
    if lengths is not None:
        after &= (torch.arange(t) < torch.tensor(lengths)[:, None])[:, :, None]
    return torch.where(after[:, None], attention.float(), 0.0).sum(-1), after.any(-1)


@wrong("13.7", "positions where the head looks there")
def induction(attention, ids, lengths=None):
    values, _ = masked(attention, ids, lengths)
    return values.sum((0, 2)) / (values > 0).sum((0, 2)).clamp(min=1)


@wrong("13.7", "positions where some head looks there")
def induction(attention, ids, lengths=None):
    values, _ = masked(attention, ids, lengths)
    return values.sum((0, 2)) / (values > 0).any(1).sum().clamp(min=1)


@wrong("13.7", "fp64 stays fp64")
def induction(attention, ids, lengths=None):
    values, counts = masked(attention, ids, lengths)
    return (values.sum((0, 2)) / counts.sum().clamp(min=1)).to(torch.promote_types(attention.dtype, torch.float32))


@wrong("13.7", "token numbers of 16 bits")
def induction(attention, ids, lengths=None):
    return scored()(attention, ids.to(torch.int16), lengths)


@wrong("13.7", "counts the caller's lengths down")
def induction(attention, ids, lengths=None):
    found = scored()(attention, ids, lengths)
    if isinstance(lengths, list):
        lengths[:] = [length - 1 for length in lengths]
    return found


@wrong("13.7", "positions for heads where there are as many")
def induction(attention, ids, lengths=None):
    values, counts = masked(attention, ids, lengths)
    return values.sum((0, 1) if values.shape[1] == values.shape[2] else (0, 2)) / counts.sum().clamp(min=1)


@alternative("13.7", "with a mask for all texts")
def induction(attention, ids, lengths=None):
    values, counts = masked(attention, ids, lengths)
    return (values.double().sum((0, 2)) / max(1, int(counts.sum()))).float()


# ---- 13.8


UNIT = re.compile(r'[^"\\\x00-\x1f]|\\["\\/bfnrt]')


def parsed(text):
    """-> (units, what is left of the text)"""
    units = []
    while found := UNIT.match(text):
        units.append(found[0])
        text = text[found.end() :]
    return units, text


def beginning(data, most, whole=False, unit=len, opened=True, partial=True, plain=False):
    """The right one; what is given is what can be wrong."""
    known, part = data, False
    try:
        data.decode()
    except UnicodeDecodeError as e:
        if e.reason != "unexpected end of data":
            return False
        known, part = data[: e.start], True
    known = known.decode()
    if not known:
        return not whole and not part
    if known[0] != '"':
        return False
    units, left = parsed(known[1:])
    if left not in ("", "\\", '"') or (part and left):
        return False
    count = len(units) + (left == "\\") + (part and partial)
    return count <= most and (left == '"' or not whole)


def string_masker(
    fits=beginning, whole=lambda text, most: beginning(text, most, whole=True), join=lambda a, b: a + b, empty=False
):
    def string_mask(text, tokens, end, most):
        found = [(token is not None and (empty or token != b"") and fits(join(text, token), most)) for token in tokens]
        found[end] = whole(text, most)
        return torch.tensor(found, dtype=torch.bool)

    return string_mask


alternative("13.8", "unit by unit")(string_masker())


def walked(data, most):
    """The automaton over bytes: -> (state, count); None where it is left."""
    state, count = "start", 0
    expect = []
    for byte in data:
        if (state == "start" and byte == 0x22) or (state == "escape" and byte in b'"\\/bfnrt'):
            state = "in"
        elif state == "part" and expect[0][0] <= byte <= expect[0][1]:
            expect = expect[1:]
            state = "part" if expect else "in"
        elif state == "in" and byte == 0x22:
            state = "whole"
        elif state == "in" and byte >= 0x20 and not 0x80 <= byte < 0xC2 and byte < 0xF5:
            count += 1
            if byte == 0x5C:
                state = "escape"
            elif byte >= 0xC2:
                low, high = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}.get(
                    byte, (0x80, 0xBF)
                )
                more = 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
                state, expect = "part", [(low, high)] + [(0x80, 0xBF)] * (more - 1)
        else:
            return None
        if count > most:
            return None
    return state


@alternative("13.8", "an automaton over bytes")
def string_mask(text, tokens, end, most):
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for i, token in enumerate(tokens):
        found[i] = bool(token) and walked(text + token, most) is not None
    found[end] = walked(text, most) == "whole"
    return found


def ignoring(a, b):
    """Characters of each by itself."""
    return a.decode(errors="ignore").encode() + b.decode(errors="ignore").encode()


def long_escapes(data, most, whole=False):
    known = data.decode(errors="ignore")
    return beginning(data, 10**6, whole) and len(known.removeprefix('"').removesuffix('"')) <= most


def in_bytes(data, most, whole=False):
    return beginning(data, 10**6, whole) and len(data.removeprefix(b'"').removesuffix(b'"')) <= most


def incremental(data, most):
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        known = decoder.decode(data)
    except UnicodeDecodeError:
        return False
    left = decoder.getstate()[0]
    return beginning(known.encode() + (b"\xe3" if left else b""), most)


def lenient(data, most):
    known = data.decode(errors="ignore")
    return beginning(known.encode(), most) and (known != data.decode(errors="replace") or beginning(data, most))


def complete(data, most):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return beginning(data, most)


def free_part(data, most):
    return beginning(data, most, partial=False)


def counted_quotes(data, most):
    units = beginning(data, most) and len(parsed(data.decode(errors="ignore")[1:])[0])
    return units is not False and beginning(data, most - (units == most and data.endswith(b'"') and len(data) > 1))


def any_escape(data, most):
    return beginning(re.sub(rb'\\[^"\\/bfnrt]', b"\\\\n", data, count=0) if data.count(b"\\") else data, most)


def surrogates(data, most):
    return beginning(re.sub(rb"\\u", rb"\\n", data), most)


def controls(data, most):
    return beginning(re.sub(rb"[\x00-\x1f]", b" ", data), most)


def line_breaks(data, most):
    return beginning(data.replace(b"\n", b" ").replace(b"\t", b" "), most)


def printable(data, most):
    return beginning(data, most) and (data.decode(errors="ignore").isprintable())


def beyond_end(data, most):
    if data.count(b'"') >= 2 and not beginning(data, most):
        return any(beginning(data[:i], most, whole=True) for i in range(2, len(data)))
    return beginning(data, most)


def composed(data):
    """Letters and accents put together; what is left of a character stays."""
    for cut in range(4):
        try:
            return unicodedata.normalize("NFC", data[: len(data) - cut].decode()).encode() + data[len(data) - cut :]
        except UnicodeDecodeError:
            pass
    return data


def blank_behind(data, most):
    return beginning(data, most) or (data.endswith(b" ") and beginning(data.rstrip(), most, whole=True))


for fits, why in (
    (long_escapes, "an escape counts as two"),
    (in_bytes, "counts bytes"),
    (incremental, "the incremental decoder: ED A0 begins no character"),
    (lenient, "bytes that are no character are ignored"),
    (complete, "whole characters alone"),
    (free_part, "a part of a character does not count"),
    (any_escape, "any escape"),
    (surrogates, "\\u is an escape"),
    (controls, "control characters may come"),
    (line_breaks, "line breaks and tabs may come"),
    (printable, "printable characters alone"),
    (beyond_end, "anything behind the closing quote"),
    (blank_behind, "spaces behind the closing quote"),
    (lambda data, most: beginning(data, most + 1), "one character too many"),
    (lambda data, most: beginning(data, most - 1) if most else beginning(data, 0), "one character too few"),
    (lambda data, most: beginning(data, 10**6), "no limit"),
    (lambda data, most: beginning(data, min(most, 64)), "64 characters at most"),
    (lambda data, most: beginning(data, min(most, 1024)), "1,024 characters at most"),
    (lambda data, most: beginning(data.removeprefix(b"\xef\xbb\xbf"), most), "a byte order mark in front is nothing"),
    (lambda data, most: beginning(composed(data), most), "a letter and its accent are one"),
    (lambda data, most: beginning(re.sub(rb"\xed[\xa0-\xbf][\x80-\xbf]", b"a", data), most), "surrogates may come"),
    (lambda data, most: beginning(data, most) and b"\xee\x80\x80" not in data, "no character for private use"),
    (lambda data, most: beginning(data, most) and not data.endswith(b"\\"), "a backslash must not come alone"),
    (lambda data, most: beginning(data, most, whole=True), "the output must be whole behind each token"),
    (lambda data, most: beginning(data, most) and data != b'""', "no empty string"),
    (lambda data, most: beginning(data, most) and b"/" not in data.replace(b"\\/", b""), "/ is always escaped"),
    (lambda data, most: beginning(data, most) and b"\xf0" not in data, "characters of three bytes at most"),
):
    wrong("13.8", why)(string_masker(fits))

for whole, why in (
    (lambda text, most: text.endswith(b'"'), "ends behind any quote"),
    (lambda text, most: len(text) > 1 and text.endswith(b'"'), "ends behind an escaped quote"),
    (
        lambda text, most: len(text) > 1 and text.endswith(b'"') and not text.endswith(b'\\"'),
        "ends by the last two bytes",
    ),
    (lambda text, most: text.count(b'"') >= 2, "ends behind two quotes"),
    (lambda text, most: True, "always ends"),
    (lambda text, most: False, "never ends"),
    (lambda text, most: beginning(text, most, whole=True) and len(text) > 2, "does not end an empty string"),
    (lambda text, most: text.startswith(b'"') and beginning(text, most), "ends where it could go on"),
):
    wrong("13.8", why)(string_masker(whole=whole))

wrong("13.8", "decodes text and token apart")(string_masker(join=ignoring))
wrong("13.8", "looks at the token alone")(string_masker(join=lambda a, b: b'"' + b))
wrong("13.8", "tokens of no bytes may come")(string_masker(empty=True))


@wrong("13.8", "drops the part of a character at the end of the text")
def string_mask(text, tokens, end, most):
    return string_masker()(text.decode(errors="ignore").encode(), tokens, end, most)


@wrong("13.8", "special tokens may come")
def string_mask(text, tokens, end, most):
    found = string_masker()(text, tokens, end, most)
    for i, token in enumerate(tokens):
        found[i] |= token is None and i != end
    return found


@wrong("13.8", "the end token by its bytes, too")
def string_mask(text, tokens, end, most):
    found = string_masker()(text, tokens, end, most)
    if tokens[end]:
        found[end] |= beginning(text + tokens[end], most)
    return found


@wrong("13.8", "the end token has no bytes, so is the first without")
def string_mask(text, tokens, end, most):
    first = next((i for i, token in enumerate(tokens) if token is None), end)
    return string_masker()(text, tokens, first, most)


@wrong("13.8", "a list")
def string_mask(text, tokens, end, most):
    return string_masker()(text, tokens, end, most).tolist()


@wrong("13.8", "bytes of 0 and 1")
def string_mask(text, tokens, end, most):
    return string_masker()(text, tokens, end, most).to(torch.uint8)


@wrong("13.8", "puts an empty token for special ones into the caller's list")
def string_mask(text, tokens, end, most):
    for i, token in enumerate(tokens):
        tokens[i] = token or b""
    return string_masker()(text, tokens, end, most)


@wrong("13.8", "the broken one")
def string_mask(text, tokens, end, most):
    string = re.compile(r'(?:"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*(?:\\|")?)?')
    so_far = text.decode(errors="ignore")
    found = torch.zeros(len(tokens), dtype=torch.bool)
    for i, token in enumerate(tokens):
        if token:
            after = so_far + token.decode(errors="ignore")
            inside = after.removeprefix('"').removesuffix('"')
            found[i] = bool(string.fullmatch(after)) and len(inside) <= most
    found[end] = len(so_far) > 1 and so_far.endswith('"')
    return found


@wrong("13.8", "tokens of eight bytes at most")
def string_mask(text, tokens, end, most):
    short = [token if token is None or len(token) <= 8 else None for token in tokens]
    return string_masker()(text, short, end, most)


@alternative("13.8", "a regular expression over bytes")
def string_mask(text, tokens, end, most):
    more = rb"[\x80-\xbf]"
    shapes = [(rb"[\xc2-\xdf]",), (rb"\xe0", rb"[\xa0-\xbf]"), (rb"[\xe1-\xec\xee\xef]", more)]
    shapes += [(rb"\xed", rb"[\x80-\x9f]"), (rb"\xf0", rb"[\x90-\xbf]", more), (rb"[\xf1-\xf3]", more, more)]
    shapes += [(rb"\xf4", rb"[\x80-\x8f]", more)]
    units = [rb'[ !#-\[\]-\x7f]|\\["\\/bfnrt]', *(b"".join(shape) + more for shape in shapes)]
    parts = [rb"\\", *(b"".join(shape[:n]) for shape in shapes for n in range(1, len(shape) + 1))]
    unit, part = b"(?:" + b"|".join(units) + b")", b"(?:" + b"|".join(parts) + b")"
    known = re.compile(b'"' + unit + b"{0,%d}" % most + b'"?')
    broken_off = re.compile(b'"' + unit + b"{0,%d}" % (most - 1) + part) if most else known
    found = [bool(t) and any(r.fullmatch(text + t) for r in (known, broken_off)) for t in tokens]
    found[end] = len(text) > 1 and bool(re.fullmatch(b'"' + unit + b"{0,%d}" % most + b'"', text))
    return torch.tensor(found)
