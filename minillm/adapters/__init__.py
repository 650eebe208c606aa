"""Small changes of a large model: LoRA, and adapters that cannot be merged; in PEFT's format, many at once."""

from .lora import Adapter, LoraConfig, adapted, adapter_of, attach, detach, merge, unmerge
from .serving import LoRARequest

__all__ = ["Adapter", "LoRARequest", "LoraConfig", "adapted", "adapter_of", "attach", "detach", "merge", "unmerge"]
