# %% [markdown]
# # Exercises 15: serving
#
# Eight exercises on [chapter 15](../chapters/15_serving.md) and its [lab](../notebooks/15_serving.ipynb): two
# **warm-ups** of ten minutes (15.1 and 15.2), the **core** (15.3 and 15.4), and four steps **beyond** (15.5 to 15.8,
# optional), which neither chapter nor lab shows in this form.
#
# Run the next cell, then take the exercises in any order. Replace `raise NotImplementedError(...)` by your code and
# run the `check` cell under it: it says which contracts hold, and on a failure what was expected and what came.
#
# Conventions, in all of them: times are in seconds. A **replica** is one of several servers that can all answer the
# same requests. What a function is given stays as it is. Nothing here needs a server, a thread or a clock of its own.

# %%
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from minillm.learn import check

# %% [markdown]
# ## Exercise 15.1: percentiles that keep the failures
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: a percentile by its definition | 1 of 5 | 10 | Tene, 2013 |
#
# `latencies` holds the seconds that each request of a test took, in any order; **None** is a request that got no
# answer, and counts as slower than any that did. The p-th percentile is the **smallest latency such that at least p
# percent of all requests were as fast or faster**; it is one of the latencies, never a mean of two. It is `math.inf`
# if only failures are slow enough. p = 0 gives the fastest.
#
# `percents` are ints, or floats with at most one decimal (99.9), each exactly as it is written: of 1,000 latencies
# 99.9 percent are 999. Return a dictionary: each percent, as it was given -> its percentile.
#
# A ValueError: no latencies, a latency that is negative or NaN, a percent outside of 0 to 100 or NaN.


# %%
def percentiles(latencies: Sequence[float | None], percents: Sequence[float]) -> dict[float, float]:
    """{percent: latency}"""
    ### BEGIN SOLUTION
    ordered = sorted(math.inf if one is None else one for one in latencies)
    if not ordered or not all(one >= 0 for one in ordered):
        raise ValueError("latencies: expected at least one, None or 0 and more")
    found = {}
    for percent in percents:
        if not 0 <= percent <= 100:
            raise ValueError(f"percents: expected 0 to 100, got {percent}")
        rank = -(-round(10 * percent) * len(ordered) // 1000)  # rounded up, in whole numbers
        found[percent] = ordered[max(rank, 1) - 1]
    return found
    ### END SOLUTION


# %%
check("15.1", percentiles)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Sort, with failures as infinity. How many of n latencies are p percent, rounded up? That many must be at or below the
# result. What does sorting do with NaN?
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `0.07 * 100` is more than 7 in floating point, and its ceiling is 8. Count in tenths of a percent, as ints:
# `-(-a // b)` rounds up without a float.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** A test that drops its failures praises the server that refuses: with 5 of 100 requests refused, p99 of the
# other 95 says nothing about the five users who waited for nothing. As infinity they show: p95 is a number, p96 is not.
#
# Percentiles cannot be averaged: p99 of two servers is not the mean of both. What can be added is counts, which is why
# Prometheus stores histograms. And p99 needs samples: of 100 latencies it is the second largest, of 50 the largest.

# %% [markdown]
# ## Exercise 15.2: Little's law on a log
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | warm-up: how many are there, how many come, how long they stay | 1 of 5 | 10 | Little, 1961 |
#
# `requests` are (arrived, left) times, in any order; left is None for one that is still there. Of the window from
# `begin` up to `end` return
#
# - `present`: how many requests were there, on average over the window's time,
# - `rate`: arrivals a second, of those with begin ≤ arrived < end,
# - `seconds`: how long a request stays, **by Little's law** from the two numbers; None if nothing arrived.
#
# A request that arrived before the window, or leaves after it, counts for the part within. `end` not after `begin`,
# or a request that left before it arrived, is a ValueError.


# %%
def little(
    requests: Sequence[tuple[float, float | None]], begin: float, end: float
) -> tuple[float, float, float | None]:
    """(present, rate, seconds)"""
    ### BEGIN SOLUTION
    if not begin < end:
        raise ValueError(f"end: expected after begin = {begin}, got {end}")
    inside, arrivals = 0.0, 0
    for arrived, left in requests:
        if left is not None and left < arrived:
            raise ValueError(f"requests: expected each to leave after it arrived, got {arrived}, {left}")
        until = end if left is None else min(left, end)
        inside += max(0.0, until - max(arrived, begin))
        arrivals += begin <= arrived < end
    present, rate = inside / (end - begin), arrivals / (end - begin)
    return present, rate, present / rate if arrivals else None
    ### END SOLUTION


# %%
check("15.2", little)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The average over time of how many are there is an area over a width: each request adds the seconds that it spends in
# the window.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# A request's part: from the later of `arrived` and `begin` to the earlier of `left` and `end`, and never less than 0.
# present = rate · seconds.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** The law asks for no distribution and no order of service; it needs a system that neither fills nor empties.
# The mean over *finished* requests, which is what most dashboards show, misses those that are still there, and these
# are the slow ones: in a server that hangs it looks best when all is lost. present / rate grows as it should.
#
# Turned around it sizes a queue: whoever promises the first token after 2 s and computes 40,000 prompt tokens a second
# may let 80,000 tokens wait. More are not service, but a longer list of broken promises.

# %% [markdown]
# ## Exercise 15.3: server-sent events, from bytes
#
# | Goal | Difficulty | Minutes | Source |
# |---|---|---|---|
# | core: a parser that does not care where the network cuts | 2 of 5 | 25 | WHATWG HTML, "Server-sent events" |
#
# `Events().feed(data)` takes the next bytes of a stream, cut **anywhere** (inside a character, between CR and LF, also
# none at all), and returns the events that are now complete: a list of (event, data), both text.
#
# - The stream is UTF-8; bytes that are not become U+FFFD. A byte order mark at the very start is dropped.
# - A line ends with LF, CR, or CR LF (one end, not two). It counts once its end has begun: a CR ends it at once.
# - An **empty line completes an event**. What is not completed is never given.
# - A line is `field: value`; **one** space after the first colon is dropped, if there is one. Without a colon the whole
#   line is a field with an empty value. A line that begins with a colon is a comment.
# - `data` appends its value to the event's data, with "\n" between two. `event` names the event, the last one counts.
#   All other fields (id, retry, whatever comes) are ignored; names are case-sensitive.
# - An event without any `data` line is not given, and its name forgotten. An event without a name, or with an empty
#   one, is called "message".


# %%
class Events:
    """A stream's parser."""

    def __init__(self) -> None:
        ### BEGIN SOLUTION
        import codecs

        self.decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self.line, self.name, self.data, self.after_cr = "", "", [], False
        ### END SOLUTION

    def feed(self, data: bytes) -> list[tuple[str, str]]:
        """The next bytes -> [(event, data), ...] that they complete"""
        ### BEGIN SOLUTION
        found = []
        for char in self.decoder.decode(data):
            ends = char == "\r" or (char == "\n" and not self.after_cr)
            self.after_cr = char == "\r"
            if char not in "\r\n":
                self.line += char
            elif ends and self.line:
                field, _, value = self.line.partition(":")
                if field == "data":
                    self.data.append(value.removeprefix(" "))
                elif field == "event":
                    self.name = value.removeprefix(" ")
                self.line = ""
            elif ends:
                if self.data:
                    found.append((self.name or "message", "\n".join(self.data)))
                self.name, self.data = "", []
        return found
        ### END SOLUTION


# %%
check("15.3", Events)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `codecs.getincrementaldecoder("utf-8-sig")` keeps half a character until its other half comes, and drops the mark.
# Keep a line that is not complete, too; and whether the last character was a CR: an LF behind it ends nothing.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `str.splitlines` splits at a dozen other characters, too, such as U+2028, which a model may well write. `partition`
# gives field and value; a comment's field is empty. An empty `data` line is a line of data.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** On the loopback address each event comes in one piece, and `for chunk in response: json.loads(chunk[6:])`
# works for months. Behind a proxy, over TLS or with longer texts pieces are cut and joined, and the client loses tokens
# or dies at a "é". Comments are what servers send to keep a connection open (": ping").
#
# OpenAI's streams use `data` alone, one line each, and end with `data: [DONE]`. Without that line an answer is not
# complete, even if the connection was closed in good order.

# %% [markdown]
# ## Exercise 15.4: a token bucket that settles
#
# | Goal | Difficulty | Minutes | Source |
# |---|---|---|---|
# | core: rate limits where the price is known afterwards | 2 of 5 | 20 | Turner, 1986; RFC 2697 |
#
# A key may use `rate` tokens a second, and `burst` at once. `Bucket(rate, burst, clock)` begins full; `clock()` says
# the time. The level rises by `rate` a second, never above `burst`.
#
# - `take(tokens)`: if so many are there, take them and return 0. Else take **nothing**, and return the seconds until
#   they will be there if nobody else takes any. More than `burst` will never be there: a ValueError.
# - `settle(tokens)`: a request has used so many more than it took, or fewer, if negative. The level falls or rises at
#   once: **below 0, too** (a debt that is waited off), and never above `burst`.
# - `level()`: what is there now; negative for a debt.
#
# A clock that steps back counts as one that stands still until it is past its latest time again; waits, too, are
# counted from that latest time. No calls: no work, however long nobody came. `rate` and `burst` that are not positive,
# or negative tokens to take, are a ValueError.


# %%
class Bucket:
    """What one key may still use."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        ### BEGIN SOLUTION
        if not (rate > 0 and burst > 0):
            raise ValueError(f"rate, burst: expected more than 0, got {rate}, {burst}")
        self.rate, self.burst, self.clock = rate, burst, clock
        self.there, self.at = burst, clock()
        ### END SOLUTION

    def level(self) -> float:
        """Tokens that are there."""
        ### BEGIN SOLUTION
        now = max(self.at, self.clock())
        self.there = min(self.burst, self.there + (now - self.at) * self.rate)
        self.at = now
        return self.there
        ### END SOLUTION

    def take(self, tokens: float) -> float:
        """0, or the seconds to wait."""
        ### BEGIN SOLUTION
        if not 0 <= tokens <= self.burst:
            raise ValueError(f"tokens: expected 0 to {self.burst}, got {tokens}")
        if tokens > self.level():
            return (tokens - self.there) / self.rate
        self.there -= tokens
        return 0.0
        ### END SOLUTION

    def settle(self, tokens: float) -> None:
        """More tokens were used than taken, or fewer."""
        ### BEGIN SOLUTION
        self.there = min(self.burst, self.level() - tokens)
        ### END SOLUTION


# %%
check("15.4", Bucket)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Two numbers are enough: the level, and the time at which it was that. Whoever asks first brings them up to date.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# Bring the level up to date *before* it is changed: a bucket that was full an hour ago and is paid back now must not
# count that hour for the tokens that came back. `take(0)` with a debt has to wait for the debt.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** In any t seconds a key gets at most burst + rate · t tokens: that is what a bucket promises. A counter "so
# many a minute" that is reset at full minutes does not: it gives twice as much around the reset.
#
# The price of a request is not known when it comes, since nobody knows how long the answer will be. To take
# `max_tokens` and pay back the rest (minillm) never overdraws, and refuses who asks for 4,000 and needs 50. To take
# the prompt alone and settle at the end admits more, and lets a key overdraw once; the debt makes the next one wait.

# %% [markdown]
# ## Exercise 15.5: homes that move as little as they can (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: consistent hashing with weights | 3 of 5 | 25 | Karger et al., 1997; Schindelhauer, Schomaker, 2005 |
#
# `home(session, replicas)` says which replica a session belongs to, so that its cache is found again. `replicas` maps
# each name to a **weight** of 0 or more. The answer depends on nothing else, and:
#
# - **shares**: a replica is home to weight / (sum of all weights) of all sessions; of weight 0: to none.
# - **little moves**: if a replica goes, or its weight falls, only sessions that lived *there* move. If one comes, or
#   its weight rises, sessions move only *to it*. So of n equal ones 1/n of all sessions move, not nearly all of them.
# - The order of the mapping does not count, nor do calls before. Each process gives the same answer, so `hash` of a
#   text is no use, which Python seeds anew for each. One pair of session and name tells nothing about another:
#   ("ab", "c") is another pair than ("a", "bc").
# - Names and sessions are any texts, empty ones and lone surrogates too. No replica with a weight above 0, or a
#   negative, infinite or NaN one, is a ValueError.


# %%
def home(session: str, replicas: Mapping[str, float]) -> str:
    """The name of the session's replica"""

    ### BEGIN SOLUTION
    def uniform(name: str) -> float:
        """A number from above 0 to below 1 that this pair always gets."""
        pair = json.dumps([session, name]).encode()
        return (int.from_bytes(hashlib.blake2b(pair, digest_size=6).digest()) + 0.5) / 2**48

    if not all(0 <= weight < math.inf for weight in replicas.values()):
        raise ValueError("replicas: expected finite weights of at least 0")
    rivals = [name for name, weight in replicas.items() if weight > 0]
    if not rivals:
        raise ValueError("replicas: expected one with a weight above 0")
    return min(rivals, key=lambda name: (-math.log(uniform(name)) / replicas[name], name))
    ### END SOLUTION


# %%
check("15.5", home)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Give each pair of session and replica a number that depends on this pair alone; the best one is the home. Why does
# nothing else move when one replica goes? A digest of `hashlib` is the same in each process.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# With weights: if u is uniform between 0 and 1, -ln(u) / w is the time of the first event of a clock with rate w. Of
# several clocks, the one with rate w_i rings first with probability w_i / Σ w.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** `digest % n` is as even, and moves (n - 1) / n of all sessions when a replica comes: at ten replicas 90
# percent of all caches are cold at once, just when load was high enough to add one. Here each replica has a number of
# its own for each session, and a change of one replica changes only comparisons with it.
#
# u · w instead of -ln(u) / w moves as little, but its shares are wrong: with weights 2 and 1 it gives 3/4 and 1/4. A
# ring with many points for each replica (Karger) needs log n instead of n per look-up; at eight replicas nobody sees
# that. A home can still be too full: hashing knows nothing of load. minillm's `SessionHash` passes a full one over.

# %% [markdown]
# ## Exercise 15.6: two choices with old news (optional)
#
# | Goal | Difficulty | Minutes | Paper |
# |---|---|---|---|
# | beyond: a router that counts what it sent since the last report | 3 of 5 | 25 | Mitzenmacher, 2000 and 2001 |
#
# One of several routers in front of replicas 0 to n - 1. Each replica reports from time to time how many requests it
# has, of **all** routers. Between reports, the router knows only what it did itself. Its estimate of a replica's load:
#
# **own** requests there now + **others**, where others = the last report - own *when it came*, never below 0 (a report
# may be older than what was just sent).
#
# - `TwoChoices(n, draw)`: `draw()` gives two replicas, different ones unless n is 1. `choose` calls it **once**.
# - `choose()`: of the two drawn the one with the smaller estimate, of equal ones the first; the request is sent there.
#   If one of the two is lost, the other. If both are lost, the least loaded of all that are not, of equal ones the
#   smallest number; None if there is none.
# - `finished(replica)`: one of the own requests there has ended. `report(replica, requests)`: a report.
# - `lost(replica)`: it is gone, and with it the own requests there and what it reported; none of them will be
#   `finished`. With its next report it is back, and has no own requests.


# %%
class TwoChoices:
    """Which replica gets the next request."""

    def __init__(self, n: int, draw: Callable[[], tuple[int, int]]) -> None:
        ### BEGIN SOLUTION
        self.draw, self.own, self.others, self.here = draw, [0] * n, [0] * n, [True] * n
        ### END SOLUTION

    def choose(self) -> int | None:
        """A replica; the request is sent there."""
        ### BEGIN SOLUTION
        drawn = [one for one in self.draw() if self.here[one]]
        left = drawn or [one for one, here in enumerate(self.here) if here]
        if not left:
            return None
        chosen = min(left, key=lambda one: self.own[one] + self.others[one])
        self.own[chosen] += 1
        return chosen
        ### END SOLUTION

    def finished(self, replica: int) -> None:
        """One of the own requests there has ended."""
        ### BEGIN SOLUTION
        self.own[replica] -= 1
        ### END SOLUTION

    def report(self, replica: int, requests: int) -> None:
        """It has so many requests, of all routers."""
        ### BEGIN SOLUTION
        self.here[replica] = True
        self.others[replica] = max(0, requests - self.own[replica])
        ### END SOLUTION

    def lost(self, replica: int) -> None:
        """It is gone, with all it had."""
        ### BEGIN SOLUTION
        self.here[replica], self.own[replica], self.others[replica] = False, 0, 0
        ### END SOLUTION


# %%
check("15.6", TwoChoices)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three lists: own, others, and who is there. A report changes `others` alone; what is sent and finished changes `own`
# alone.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# `min` gives the first of equal ones, so the order of its candidates is the rule for ties.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** "The least loaded", by reports that are 5 seconds old, is one replica for 5 seconds and for every router: all
# send there, and at the next report it is the fullest and another one is flooded (a herd). Two choices hit the apparent
# minimum only in 2/n of all cases. Own requests count at once, so that not even one router floods anybody by itself.
#
# With `max(0, ...)` left out, a report that was written before the last ten requests arrived makes a replica look ten
# requests emptier than it is, until the next one: a small herd of its own.

# %% [markdown]
# ## Exercise 15.7: what may be answered from a cache (optional)
#
# | Goal | Difficulty | Minutes | Source |
# |---|---|---|---|
# | beyond: the key of a cache of answers, and when there is none | 3 of 5 | 25 | OpenAI's API reference |
#
# `cache_key(client, body, digests)` names a request: two requests get the same key **if and only if** one may get the
# other's answer, by the rules below. `body` is what JSON gives, `digests` maps each model's name to a digest of its
# weights.
#
# - **None** where no answer is *the* answer: temperature above 0 without a seed. A missing temperature is 1; seed 0 is
#   a seed. None also for a model that is missing or not in `digests`.
# - What decides: the `client` (one shall not learn what another asked), the model's digest, not its name, and all
#   fields but `model` and those of `WITHOUT_EFFECT`. Unknown fields count. At temperature 0 `seed` and `top_p` have no
#   effect.
# - A field of the body that is null, or has its value of `DEFAULTS`, counts as not given. Numbers count by their value
#   (1 and 1.0 are one, at all depths, and large seeds are exact), but true is not 1, and "1" is not 1.
# - The order of fields does not count, at all depths; the order of lists does.
# - The key is text of at most 128 printable ASCII characters, with 64 bits of a digest or more, the same in each
#   process. It **does not contain** the client, who may be an API key, nor parts of it, in any encoding. Two texts that
#   look alike are still two: nothing is trimmed, folded or replaced.

# %%
WITHOUT_EFFECT = {"stream", "stream_options", "user", "metadata", "timeout", "priority"}
DEFAULTS = {"temperature": 1, "top_p": 1, "n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0}


def cache_key(client: str, body: dict, digests: Mapping[str, str]) -> str | None:
    """The request's name, or None if its answer may not be kept"""

    ### BEGIN SOLUTION
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def said(value: object) -> str:
        return json.dumps(plain(value), sort_keys=True)

    given = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    model = digests.get(given.pop("model", ""))
    greedy = given.get("temperature", 1) == 0
    if model is None or not (greedy or "seed" in given):
        return None
    if greedy:
        given = {name: value for name, value in given.items() if name not in ("seed", "top_p")}
    given = {n: value for n, value in given.items() if n not in DEFAULTS or said(value) != said(DEFAULTS[n])}
    return hashlib.sha256(said([client, model, given]).encode()).hexdigest()
    ### END SOLUTION


# %%
check("15.7", cache_key)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# First bring the request into one form: drop what does not decide, then write the rest so that equal requests give
# equal texts and unequal ones unequal texts. A digest of that text is the key. `json.dumps` has an option for order.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# In Python `True == 1 == 1.0`, so `value == DEFAULTS[name]` says too often yes; their JSON texts differ. Turn floats
# that are whole numbers into ints (not ints into floats: 2**53 + 1 has no float).
# </details>

# %% [markdown] tags=["solution"]
# **Why.** Each sentence is somebody's incident. A key without the client tells one tenant, by the time an answer takes,
# what another has asked. A key with the model's *name* gives the old model's answers after an update. A field that is
# left out of the key since nobody knew it (a template's variable, a grammar) gives answers to another question; so all
# fields count but those of a short list. The other way round (a list of fields that count) fails with each new field.
#
# A semantic cache ("similar enough") breaks "if and only if" on purpose. Measure its wrong hits before you trust it.

# %% [markdown]
# ## Exercise 15.8: a proxy that retries too much (optional)
#
# | Goal | Difficulty | Minutes | Source |
# |---|---|---|---|
# | beyond: mend a retry that a client can see | 3 of 5 | 25 | RFC 9110, 9.2.2 |
#
# A replica is a function: `replica(request)` gives an iterator of events, or raises `Refused(status)`, at the call or
# in place of the first event. An event is a dictionary: `{"text": ...}` (the first one of a stream has the text "",
# it only says that somebody answers), and at the end `{"finish": ...}`. A replica that breaks raises a
# `ConnectionError`, when it is called or between two events; or its events just end without a finish.
# `forward(replicas, request)` gives the events for the client:
#
# - Replicas are tried in their order, each at most once, at most `attempts` of them.
# - A replica that breaks **before the first text that is not empty**, or a finish, is followed by the next one, and
#   nothing of it reaches the client. Once such an event has been given, nobody can begin anew: the stream ends with
#   `{"error": 502}`. No event is held back after that, and none is asked for before the client wants it.
# - `Refused` with status 429 or 503 says that this replica has no room: the next one. All others are the request's own
#   fault: `{"error": status}` at once.
# - If no replica is left: the status of the last refusal, else 503, as `{"error": ...}`. A finish is the last event,
#   whatever the replica sends after it.
# - Every iterator that was begun is closed (`close()`, where it has one) before another replica is asked, and however
#   it ends: also when the client leaves. Errors of other kinds are not the network's: they are raised.
#
# Mistakes of four kinds were planted. Write the mended function.


# %%
class Refused(Exception):
    """A replica that does not take a request."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def broken(replicas, request, attempts=3):
    """A proxy with mistakes of four kinds."""
    for ask in replicas[:attempts]:
        try:
            yield from ask(request)
            return
        except Exception as error:
            last = error
    yield {"error": getattr(last, "status", 503)}


# %% [markdown]
# The function that keeps to it:


# %%
def forward(replicas: Sequence[Callable], request: dict, attempts: int = 3) -> Iterator[dict]:
    """A generator of events, of which the last is a finish or an error."""
    ### BEGIN SOLUTION
    status = 503
    for replica in replicas[:attempts]:
        held, begun, events = [], False, None
        try:
            events = replica(request)
            for event in events:
                held.append(event)
                begun = begun or bool(event.get("text")) or "finish" in event
                while begun and held:
                    yield held.pop(0)
                if "finish" in event:
                    return
        except Refused as refusal:
            status = refusal.status
            if begun or status not in (429, 503):
                yield {"error": 502 if begun else status}
                return
        except ConnectionError:
            pass
        finally:
            getattr(events, "close", lambda: None)()
        if begun:
            yield {"error": 502}
            return
    yield {"error": status}
    ### END SOLUTION


# %%
check("15.8", forward)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Keep the events of a replica in a list until it has said something; from then on give them as they come. Two states
# for each attempt: nobody has seen anything, or somebody has.
# </details>

# %% [markdown]
# <details><summary>Hint 2</summary>
#
# The four: text that is given twice; a loop that ends without a finish is taken for success; every error leads to the
# next replica; iterators stay open. A client that leaves closes your generator: `GeneratorExit` is raised at the
# `yield`, and `finally` runs.
# </details>

# %% [markdown] tags=["solution"]
# **Why.** (1) A retry after the first token gives "The capital The capital of ...": the second replica draws other
# tokens, and nobody can cut out what the client has. (2) A connection that is closed in order looks like an end; only a
# finish is one. (3) A request that is refused with 400 is refused by all, and one that kills its replica kills as many
# as it is tried on: hence `attempts`. (4) Whoever leaves and is not noticed leaves a request behind that computes
# thousands of tokens for nobody.
#
# To generate twice harms nobody, so this retry is allowed though POST is not idempotent. It costs: `attempts` times the
# load just when replicas break. Proxies in production bound the share of retries, too (a retry budget).
