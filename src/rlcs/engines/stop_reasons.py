"""Translates the finish reasons of all providers to `StopReason`."""

from rlcs.records import StopReason

STOP_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"), StopReason.EOS),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), StopReason.LENGTH),
    **dict.fromkeys(("content_filter", "refusal", "safety", "prohibited_content"), StopReason.ERROR),
    **dict.fromkeys(("abort", "error", "insufficient_system_resource"), StopReason.ERROR),
}
"""Stop reasons by the provider's finish reason in lower case."""
RETRYABLE = frozenset({"abort", "error", "insufficient_system_resource"})
"""Finish reasons of answers that a fault of the server cut off; the other errors are final."""


def stop_reason(finish_reason: object) -> StopReason:
    """Translate a finish reason. An unknown or missing one counts as cut off, never as finished."""
    return STOP_REASONS.get(str(finish_reason).lower(), StopReason.LENGTH)
