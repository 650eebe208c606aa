"""A server that OpenAI's clients use without noticing. `app` makes it, `run` listens.

The engine steps in a thread of its own (`bridge`). The event loop reads bodies (`protocol`), says who may come in
(`admission`), and writes answers (`answers`).
"""
