"""Llama, Mistral, Qwen2 and Qwen3: layers, model, tokenizer, weights."""

from .transformer import Transformer

__all__ = ["Transformer"]
