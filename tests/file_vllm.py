#!/usr/bin/env python3
"""`vllm` with a way to receive weights from files, as a real one on a CPU has none: see `file_channel.py`."""

import contextlib
from dataclasses import dataclass

from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class Init(WeightTransferInitInfo):
    server: int


@dataclass
class Update(WeightTransferUpdateInfo):
    names: list
    dtype_names: list
    shapes: list
    path: str


class FileEngine(WeightTransferEngine):
    """As vLLM's engines for NCCL and IPC do it, but for the way of the bytes."""

    init_info_cls = Init
    update_info_cls = Update

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))  # without waiting for a GPU

    def receive_weights(self, update_info):
        tensors = load_file(update_info.path)
        assert [list(tensors[name].shape) for name in update_info.names] == update_info.shapes
        self.model.load_weights((name, tensors[name]) for name in update_info.names)

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self):
        pass


with contextlib.suppress(ValueError):  # it is registered already
    WeightTransferEngineFactory.register_engine("file", FileEngine)

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
