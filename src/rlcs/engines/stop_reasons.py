"""Translates the finish reasons of all providers to `StopReason`: the one table of them.

From the references of OpenAI, Azure, Anthropic, Google, Mistral, DeepSeek, Moonshot, Zhipu, Cohere, Bedrock,
OpenRouter and Together, and the sources of vLLM, SGLang, TGI and Ollama, as their OpenAI-compatible servers
and the proxies before them pass the reasons on.
"""

from rlcs.records import StopReason

_FINISHED = "stop eos eos_token stop_token end_turn stop_sequence complete completed"
_CUT_OFF = (
    "length max_tokens max_output_tokens max_length model_length model_context_window_exceeded "
    "context_length_exceeded repetition pause_turn incomplete"
)
_WITHHELD = (
    "content_filter content_filtered refusal refused safety image_safety recitation prohibited_content "
    "blocklist spii language sensitive guardrail_intervened error_toxic"
)
TOOL_CALLS = frozenset(
    "tool_calls tool_call tool_use function_call malformed_function_call unexpected_tool_call".split()
)
"""The model called a tool although none was offered: what it wrote before is no finished answer."""
RETRYABLE = frozenset(
    "abort aborted cancelled canceled user_cancel error server_error network_error timeout error_limit "
    "insufficient_system_resource".split()
)
"""Finish reasons of answers that a fault of the server cut off; the other errors are final."""
STOP_REASONS = {
    **dict.fromkeys(_FINISHED.split(), StopReason.EOS),
    **dict.fromkeys((*_CUT_OFF.split(), *TOOL_CALLS), StopReason.LENGTH),
    **dict.fromkeys((*_WITHHELD.split(), *RETRYABLE), StopReason.ERROR),
}
"""Stop reasons by the provider's finish reason as `plain` writes it."""


def plain(finish_reason: object) -> str:
    """A finish reason as in the table: `FINISH_REASON_STOP` and `Stop` are `stop`; empty if there is none."""
    text = str(finish_reason or "").strip().lower().replace("-", "_").removeprefix("finish_reason_")
    return "" if text in ("none", "null") else text


def stop_reason(finish_reason: object) -> StopReason:
    """Translate a finish reason. An unknown or missing one counts as cut off, never as finished."""
    return STOP_REASONS.get(plain(finish_reason), StopReason.LENGTH)
