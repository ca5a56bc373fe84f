"""The environment that `torchrun` gives to the ranks of a run, and programs that must not inherit it."""

from collections.abc import Mapping

from rlcs.cores import STARTED

_OF_A_RANK = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
}
_PREFIX = "TORCHELASTIC_"
_ONE_THREAD = ("OMP_NUM_THREADS", "1")


def outside_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that a rank starts and that has process groups of its own, such as vLLM.

    With a rank's variables (`TORCHELASTIC_USE_AGENT_STORE`) they would wait for a store that nobody hosts.
    The single thread that `torchrun` sets for its ranks goes too: vLLM chooses for itself.
    """
    if STARTED not in environment:
        return dict(environment)
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_RANK and not name.startswith(_PREFIX) and (name, value) != _ONE_THREAD
    }
