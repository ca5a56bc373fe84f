"""Sends new weights to vLLM's servers from GPU to GPU, by vLLM's own weight transfer instead of a folder.

vLLM 0.32 has two ways that fit here (`vllm/distributed/weight_transfer`), neither of them on a CPU. `ipc`: a
server on the GPU of a rank reads that rank's memory. `nccl`: servers on GPUs of their own receive what rank 0
broadcasts; NCCL must have the same version on both sides. Weights go in chunks, as the model's folder on the
hub names them. A server that loses them later can get them only through a folder again.
"""

import base64
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.server import DownError
from rlcs.engines.vllm.weights import Weights
from rlcs.errors import EndpointError, TrainingError
from rlcs.model.serving_weights import serving_dtype, serving_weights
from rlcs.model.vlm import Vlm

CHUNK_BYTES = 1 << 30
"""Size of a chunk; a larger tensor is a chunk of its own."""
Chunk = list[tuple[str, Tensor]]


class Channel(Protocol):
    """A way for the bytes of a chunk; all ranks call the methods together."""

    def connect(self, fleet: Fleet, weights: Weights, *, asks: bool) -> None:
        """Connect the servers, if they are not, and prepare them for new weights."""
        ...

    def send(self, fleet: Fleet, chunk: Chunk, *, asks: bool) -> None:
        """Send one chunk."""
        ...

    def finish(self) -> None:
        """Free what the servers have read."""
        ...


class Transfer:
    """Sends the weights of models to the servers of one fleet."""

    def __init__(
        self,
        fleet: Fleet,
        channel: Channel,
        *,
        ranks: int,
        compute_dtype: str = "same",
        required: bool = False,
    ) -> None:
        """Every `ranks` ranks share a fleet, and their first asks it; `compute_dtype` as in the folder."""
        self._fleet, self._channel = fleet, channel
        self._ranks, self._compute = ranks, compute_dtype
        self.is_required = required
        """Whether a folder is no way out."""

    def send(self, vlm: Vlm, weights: Weights) -> None:
        """Send the model's weights as these; all ranks must call it.

        Raises TransferError on every rank if a server failed; its servers are ended then.
        """
        fleet, channel, world = self._fleet, self._channel, vlm.world
        asks = world.rank % self._ranks == 0
        self._agree(vlm, lambda: channel.connect(fleet, weights, asks=asks))
        dtype, untied = serving_dtype(vlm, self._compute), vlm.device.type == "cpu"  # as in the folder
        for chunk in chunks(serving_weights(vlm, dtype, untied=untied), vlm.device):
            self._agree(vlm, partial(channel.send, fleet, chunk, asks=asks))
        self._agree(vlm, lambda: fleet.finish_update(weights.version) if asks else None)
        channel.finish()

    def _agree(self, vlm: Vlm, work: Callable[[], None]) -> None:
        """Do the work on every rank; raises TransferError on all if one failed."""

        def tried() -> str:
            try:
                work()
            except (DownError, EndpointError, TimeoutError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"
            return ""

        if failure := next(filter(None, vlm.world.each(tried)), ""):
            self._fleet.restart()  # their weights are half old, half new
            raise TransferError(failure)


class TransferError(Exception):
    """Weights could not be sent."""


def chunks(weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[Chunk]:
    """Join weights on a device to chunks of at least CHUNK_BYTES, but for the last."""
    chunk: Chunk = []
    for name, tensor in weights:
        chunk.append((name, tensor.to(device).contiguous()))
        if sum(each.nbytes for _, each in chunk) >= CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def description(chunk: Chunk) -> dict[str, Any]:
    """The fields that all of vLLM's ways have in common."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
    }


class IpcChannel:
    """Shares a buffer on each rank's GPU with the server there."""

    def __init__(self, vlm: Vlm, ranks: int) -> None:
        """A server uses the GPUs of `ranks` ranks and reads on each what that rank has gathered."""
        self._world, self._ranks = vlm.world, ranks
        self._buffer: Tensor | None = None

    def connect(self, fleet: Fleet, weights: Weights, *, asks: bool) -> None:
        """See `Channel.connect`."""
        if asks:
            fleet.begin_update(weights, "ipc", lambda index: {"packed": True})

    def send(self, fleet: Fleet, chunk: Chunk, *, asks: bool) -> None:
        """See `Channel.send`.

        The handle of memory is a pickle: that is how vLLM takes it over HTTP.
        """
        # Held until all ranks have agreed on the next chunk: a server reads it here.
        buffer = self._buffer = torch.cat([tensor.view(-1).view(torch.uint8) for _, tensor in chunk])
        gpu = str(torch.cuda.get_device_properties(buffer.device).uuid)
        handles = {gpu: reduce_tensor(buffer)[1]}
        torch.cuda.synchronize(buffer.device)
        if self._ranks > 1:
            for of_rank in self._world.gather(handles):
                handles |= of_rank
        if asks:
            sizes = [tensor.nbytes for _, tensor in chunk]
            pickled = base64.b64encode(pickle.dumps(handles)).decode()
            fleet.update(description(chunk) | {"tensor_sizes": sizes, "ipc_handles_pickled": pickled})

    def finish(self) -> None:
        """See `Channel.finish`."""
        self._buffer = None
        torch.cuda.ipc_collect()


class NcclChannel:
    """Broadcasts from rank 0 to all GPUs of the servers."""

    def __init__(self, gpus: int, limit_s: float) -> None:
        """`gpus` of one server; a step of the servers may take `limit_s`."""
        self._gpus, self._limit_s = gpus, limit_s
        self._group: Any = None
        self._token = ""

    def connect(self, fleet: Fleet, weights: Weights, *, asks: bool) -> None:
        """See `Channel.connect`. A server that was started again needs a new group with all."""
        if not asks:
            return
        size = 1 + len(fleet) * self._gpus
        joining: Future[Any] | None = None
        if not fleet.is_connected(self._token):
            unique = torch.cuda.nccl.unique_id()
            self._token, joining = base64.b64encode(unique).decode(), Future()
            # A daemon: where a server cannot join, this waits for ever.
            work = (joining, unique, size, torch.cuda.current_device())
            threading.Thread(target=_join, args=work, daemon=True).start()

        def info(index: int) -> dict[str, Any]:
            offset = 1 + index * self._gpus
            return {"nccl_unique_id_b64": self._token, "rank_offset": offset, "world_size": size}

        fleet.begin_update(weights, self._token, info)
        if joining is not None:
            self._group = joining.result(self._limit_s)

    def send(self, fleet: Fleet, chunk: Chunk, *, asks: bool) -> None:
        """See `Channel.send`. Raises TrainingError if a server fails while this GPU waits for it."""
        if not asks:
            return
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(fleet.update, description(chunk))
            for _, tensor in chunk:
                torch.cuda.nccl.broadcast([tensor], 0, comms=[self._group])
            try:
                receiving.result()
            except DownError as down:
                raise TrainingError(
                    f"a vLLM server failed while it received weights: {down}",
                    where="rollout.weights",
                    fix="the same command continues from the last checkpoint; or set rollout.weights=folder",
                ) from down
        torch.cuda.synchronize()

    def finish(self) -> None:
        """See `Channel.finish`."""


def _join(joining: "Future[Any]", unique: bytes, size: int, device: int) -> None:
    """Enter the group as its first rank; vLLM sums one number over all at once, so we must too."""
    try:
        torch.cuda.set_device(device)
        group = torch.cuda.nccl.init_rank(size, unique, 0)
        torch.cuda.nccl.all_reduce([torch.zeros(1, device=device)], comms=[group])
        torch.cuda.synchronize(device)
        joining.set_result(group)
    except RuntimeError as error:
        joining.set_exception(error)
