"""A server that OpenAI's clients use without noticing. `app` makes it, `run` listens.

The engine steps in a process of its own (`process`), or a thread (`bridge`). The event loop reads bodies (`protocol`),
says who may come in (`admission`), finds answers that were given before (`response_cache`), and writes them
(`answers`). In front of several servers stands a `router`, which asks a policy (`policies`) where a request shall go.
All of it needs the extra "serve".
"""

from ..extras import require

require("serve", "starlette", "uvicorn", "h11")
