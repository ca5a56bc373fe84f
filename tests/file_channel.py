"""A way to send weights that needs no GPU: chunks lie in files, and the server is told their names.

vLLM has none; `file_vllm.py` teaches it this one.
"""

from pathlib import Path

from safetensors.torch import save_file

from rlcs.distributed import World
from rlcs.engines.vllm.fleet import Fleet
from rlcs.engines.vllm.transfer import Chunk, description
from rlcs.engines.vllm.weights import Weights


class FileChannel:
    """See `transfer.Channel`."""

    def __init__(self, folder: Path, world: World) -> None:
        """The files of this rank lie in `folder`."""
        self.folder, self.world, self.count = folder, world, 0

    def connect(self, fleet: Fleet, weights: Weights, *, asks: bool) -> None:
        if asks:
            fleet.begin_update(weights, "file", lambda index: {"server": index})

    def send(self, fleet: Fleet, chunk: Chunk, *, asks: bool) -> None:
        self.count += 1
        path = self.folder / f"chunk-{self.world.rank}-{self.count}.safetensors"
        save_file({name: tensor.clone() for name, tensor in chunk}, path)
        if asks:
            fleet.update(description(chunk) | {"path": str(path)})

    def finish(self) -> None:
        pass
