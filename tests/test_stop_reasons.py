"""Finish reasons of all providers, and what becomes of the answers that have them."""

import pytest

from rlcs.engines.stop_reasons import RETRYABLE, STOP_REASONS, plain, stop_reason
from rlcs.records import StopReason

FINISHED = ("stop", "STOP", "FINISH_REASON_STOP", "eos", "eos_token", "end_turn", "stop-sequence", "COMPLETE")
CUT_OFF = (
    *("length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens", "repetition", "pause_turn"),
    *("model_context_window_exceeded", "tool_calls", "function_call", "MALFORMED_FUNCTION_CALL"),
    *("", None, "null", "OTHER", "tired", "stopped by lightning", "FINISH_REASON_UNSPECIFIED", 7),
)
FAILED = (
    *("content_filter", "SAFETY", "RECITATION", "refusal", "PROHIBITED_CONTENT", "guardrail_intervened"),
    *("abort", "error", "insufficient_system_resource", "network_error", "cancelled"),
)


@pytest.mark.parametrize(
    ("reasons", "stop"),
    [(FINISHED, StopReason.EOS), (CUT_OFF, StopReason.LENGTH), (FAILED, StopReason.ERROR)],
)
def test_only_what_is_known_to_be_finished_counts_as_finished(reasons, stop):
    assert {reason: stop_reason(reason) for reason in reasons} == dict.fromkeys(reasons, stop)


def test_what_a_fault_of_the_server_cut_off_is_asked_again_and_what_is_withheld_is_not():
    assert all(STOP_REASONS[reason] is StopReason.ERROR for reason in RETRYABLE)
    assert {"abort", "error", "insufficient_system_resource"} <= RETRYABLE
    assert not {"content_filter", "safety", "refusal"} & RETRYABLE
    assert all(plain(reason) == reason for reason in STOP_REASONS), "keys are written as replies are read"
