"""Why an answer ended: the finish reasons of all providers, and ours."""

from rlcs.records import StopReason

STOP_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"), StopReason.EOS),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), StopReason.LENGTH),
    **dict.fromkeys(("content_filter", "refusal", "safety", "prohibited_content"), StopReason.ERROR),
    **dict.fromkeys(("abort", "error", "insufficient_system_resource"), StopReason.ERROR),
}
"""A provider's finish reason in lower case -> ours."""
RETRYABLE = frozenset({"abort", "error", "insufficient_system_resource"})
"""Finish reasons of answers that broke off for want of the server; the other errors are final."""


def stop_reason(finish_reason: object) -> StopReason:
    """Our stop reason. An unknown or missing one counts as cut off, never as finished."""
    return STOP_REASONS.get(str(finish_reason).lower(), StopReason.LENGTH)
