"""What Prometheus reads: vLLM's names where they mean the same, so that its dashboards and routers work; then the
engine's own. No label comes from a client: each new value would be a new series, kept for ever.
"""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.metrics import EngineMetrics

__all__ = ["CONTENT_TYPE", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COUNTERS = {
    "prompt_tokens_total": "num_prompt_tokens",
    "generation_tokens_total": "num_generated_tokens",
    "num_preemptions_total": "num_preemptions",
    "prefix_cache_queries_total": "num_prompt_tokens",
    "prefix_cache_hits_total": "num_cached_tokens",
    "spec_decode_num_drafts_total": "num_drafts",
    "spec_decode_num_draft_tokens_total": "num_draft_tokens",
    "spec_decode_num_accepted_tokens_total": "num_accepted_tokens",
}
GAUGES = {"num_requests_running": "running", "num_requests_waiting": "waiting", "kv_cache_usage_perc": "cache_usage"}
HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token",
    "inter_token_latency_seconds": "inter_token_latency",
    "e2e_request_latency_seconds": "request_latency",
    "request_queue_time_seconds": "queue_time",
    "request_prefill_time_seconds": "prefill_time",
}


def render(metrics: "EngineMetrics", model: str) -> str:
    """Everything in Prometheus' text format. model: the label `model_name`."""
    label = f"model_name={json.dumps(model)}"
    lines = []
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES)):
        for name, own in names.items():
            lines += [f"# TYPE vllm:{name} {kind}", f"vllm:{name}{{{label}}} {getattr(metrics, own):.15g}"]
    for name, own in HISTOGRAMS.items():
        lines += [f"# TYPE vllm:{name} histogram", *getattr(metrics, own).lines(f"vllm:{name}", label)]
    return "\n".join(lines) + "\n" + metrics.prometheus()
