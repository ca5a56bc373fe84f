"""Where weights lie on a GPU that is not there: `python pretend_gpu.py CHOICES`, a process of its own.

Fake tensors know their device and shape and have no content; an operation over two devices raises. The
process is rank 0 of eight (torch's fake process group), and the calls that need a driver are replaced.
Backward passes need a real one: gradients are made by hand. Prints what lies where under each of
the choices of `parallel`, as JSON.
"""

import json
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForImageTextToText

from rlcs.distributed import World, own_part
from rlcs.model import fsdp, loading
from rlcs.model.families import FAMILIES
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Parallel
from rlcs.recipe.stages import Optimizer
from rlcs.train import state as state_of
from rlcs.train.trainer import make_optimizer

GPU = torch.device("cuda", 0)


class Nothing:
    """A stream or an event."""

    device = GPU

    def __init__(self, *args, **options):
        pass

    def record_event(self, *args):
        return Nothing()

    def wait_event(self, *args):
        pass

    wait_stream = record = wait = synchronize = wait_event


def pretend() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: 0
    cuda.device_count = lambda: 1
    cuda.is_initialized = lambda: True
    cuda.set_device = lambda device: None
    cuda.Stream = cuda.Event = torch.Event = Nothing
    cuda.current_stream = Nothing
    cuda.stream = lambda stream: nullcontext()
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.Tensor.pin_memory = lambda tensor: tensor
    dist.broadcast = lambda tensor, src: None


def devices_of(tensors) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors})


def sharded(parallel: Parallel, grid: DeviceMesh) -> Vlm:
    """The built-in model, spread over GPUs."""
    config = AutoConfig.from_pretrained(loading.resolve("builtin"))
    fsdp.init_device_mesh = lambda kind, shape: grid
    world = World(rank=0, size=8, device=GPU, objects=object(), patient=object())
    model = AutoModelForImageTextToText.from_config(config)
    family = FAMILIES[config.model_type]
    vlm = Vlm(model=model, processor=None, family=family, attention="auto", device=GPU, world=world)
    return loading.spread(vlm, parallel)


def look(vlm: Vlm) -> dict[str, list[str]]:
    """After sharding, in a forward pass, while sampling, after a step, and after a checkpoint is read."""
    model, parameters = vlm.model, dict(vlm.model.named_parameters())
    found = {"weights": devices_of(parameters.values()), "buffers": devices_of(model.buffers())}

    def work():
        ids = torch.zeros(1, 5, dtype=torch.long, device=GPU)
        states = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(states)

    with torch.no_grad():
        found["forward"] = devices_of([vlm.run(work)])
        with vlm.gathered():
            found["gathered"] = devices_of(model.parameters())
    optimizer = make_optimizer(vlm, Optimizer())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters.values()]).full_tensor()
    torch.nn.utils.clip_grads_with_norm_(list(parameters.values()), 1.0, total)
    optimizer.step()
    saved = state_of.optimizer_to_tensors(optimizer, parameters)
    found["optimizer"] = devices_of(saved.tensors.values())
    whole = {name: torch.empty(p.shape) for name, p in parameters.items()}  # on the CPU, as when read
    read = {k: t if k.startswith("step/") else whole[k.split("/")[1]] for k, t in saved.tensors.items()}
    state = state_of.OptimizerState(tensors=read, settings=saved.settings)
    state_of.restore_optimizer(optimizer, parameters, state)
    optimizer.step()
    resumed = [tensor for state in optimizer.state.values() for tensor in state.values()]
    found["resumed"] = devices_of(resumed + [own_part(whole[n], p.detach()) for n, p in parameters.items()])
    return found


def main() -> None:
    pretend()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    grid = init_device_mesh("cuda", (8,))  # of real tensors
    with FakeTensorMode():
        found = [look(sharded(Parallel(**choice), grid)) for choice in json.loads(sys.argv[1])]
    print(json.dumps(found))  # noqa: T201
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
