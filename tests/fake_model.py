"""Whole training steps of published models on tensors without content, and the bytes that they hold.

Fake tensors know their shape and format: every operation of a real step is dispatched, nothing is computed,
and 7B takes seconds on one core. This process is rank 0 of some (torch's fake process group), so FSDP2's own
code gathers, frees and reduces. What needs content is replaced: the image grids' indices are computed beside
the fake tensors, numbers read from the device are 1, and both attentions keep what a flash kernel keeps
(queries, keys, values, output, log-sum-exp), as FlexAttention has no
backward pass here.
"""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as qwen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from rlcs.distributed import World
from rlcs.model import attention, fsdp, loading, vision_attention
from rlcs.model.families import FAMILIES
from rlcs.model.layout import layout_of
from rlcs.model.packing import Pack
from rlcs.model.vlm import Vlm
from rlcs.recipe.execution import Lora, Parallel
from rlcs.train import grpo

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class FakeTree:
    """A prompt of `text` tokens and an image of `grid` patches, with `answers` of some tokens."""

    text: int
    grid: tuple[int, int]
    answers: tuple[int, ...]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


class Ledger(TorchDispatchMode):
    """Bytes of all live tensors by kind, and the peak; `kind` is that of tensors made from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.held: Counter[str] = Counter()
        self.peak, self.at_peak = 0, Counter[str]()
        self.kept = 0
        """Bytes of activations when the first backward pass begins."""
        self._live: dict[int, tuple[str, int, Any]] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "Ledger":
        def resize(storage: torch.UntypedStorage, size: int) -> None:  # how FSDP frees what it gathered
            self._resize(storage, size)
            self._set(storage, self.kind)

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor under a kind, or a new one under the present kind."""
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        if kind is not None or storage._cdata not in self._live:
            self._set(storage, kind or self.kind)

    def _set(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._live:
            old, size, reference = self._live[key]
            self.held[old] -= size
        else:
            reference = weakref.ref(storage, lambda _: self._drop(key))
        self._live[key] = (kind, storage.nbytes(), reference)
        self.held[kind] += storage.nbytes()
        if self.held.total() > self.peak:
            self.peak, self.at_peak = self.held.total(), self.held.copy()

    def _drop(self, key: int) -> None:
        kind, size, _ = self._live.pop(key)
        self.held[kind] -= size


class FlashAttention(torch.autograd.Function):
    """The tensors that a flash attention kernel makes and keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2)).transpose(1, 2)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, lse = ctx.saved_tensors
        torch.empty_like(lse)
        return tuple(map(torch.empty_like, (query, key, value)))


class FlashPlan:
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return FlashAttention.apply(query, key, value)


def tower_attention(module: nn.Module, *args: Tensor, **options: Any) -> tuple[Tensor, None]:
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3])
    return FlashAttention.apply(query, key, value).transpose(1, 2), None


class FakeSteps:
    """Replaces what needs content, until the test ends; makes models, packs and steps on fake tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.ledger = Ledger()
        self._grids: list[tuple[int, int, int]] = []
        monkeypatch.setattr(vision_attention, "attend_by_windows", tower_attention)
        monkeypatch.setattr(qwen, "get_max_seqlen", lambda *args, **options: None)
        monkeypatch.setattr(qwen, "torch_compilable_check", lambda *args: None)
        for name in ("get_vision_position_ids", "get_vision_attention_seqlens", "get_vision_window_index"):
            monkeypatch.setattr(qwen, name, self._of_real_grids(getattr(qwen, name)))
        monkeypatch.setattr(attention, "make_plan", lambda *args: FlashPlan())
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: self._numbers(tensor))
        monkeypatch.setattr(FakeTensor, "item", lambda tensor: 1.0)
        for name, kind in (
            ("unshard", "gathered"),
            ("wait_for_unshard", "gathered"),
            ("post_backward", "gradients"),
        ):
            monkeypatch.setattr(FSDPParamGroup, name, self._counted(getattr(FSDPParamGroup, name), kind))
        monkeypatch.setattr(Tensor, "backward", self._counted(Tensor.backward, "backward"))

    def _of_real_grids(self, function: Any) -> Any:
        def call(grids: Tensor, *args: Any, kwargs: object = None, **options: Any) -> Any:
            with unset_fake_temporarily():
                result = function(torch.tensor(self._grids), *args, **options)
            fakes = [self.mode.from_tensor(x) if isinstance(x, Tensor) else x for x in tree_leaves(result)]
            return tuple(fakes) if isinstance(result, tuple) else fakes[0]

        return call

    def _numbers(self, tensor: Tensor) -> list[float]:
        """Tokens of each image where there is one number for each; the numbers of a report are 1."""
        if tensor.is_floating_point():
            return [1.0] * len(tensor)
        return [rows * columns // 4 for _, rows, columns in self._grids]

    def _counted(self, function: Any, kind: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            before, self.ledger.kind = self.ledger.kind, kind
            if kind == "backward":
                self.ledger.kept = self.ledger.kept or self.ledger.held["activations"]
            try:
                return function(*args, **options)
            finally:
                self.ledger.kind = before

        return call

    def model(
        self, config: Any, *, dtype: str, checkpointing: bool, lora: Lora, frozen: Sequence[str], ranks: int
    ) -> Vlm:
        """A model as `loading` prepares it, not yet sharded."""
        config = copy.deepcopy(config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
        attention.install(model)
        if checkpointing:
            loading.checkpoint_activations(model)
        vlm = Vlm(
            model=model,
            processor=None,
            family=FAMILIES[config.model_type],
            attention="auto",
            device=CPU,
            world=World(size=ranks),
        )
        vlm = loading.prepare(vlm, lora, frozen, seed=0)
        made: dict[Tensor, Tensor] = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = made.setdefault(tensor, self._fake(tensor))  # type: ignore[assignment]
        return vlm

    def _fake(self, tensor: Tensor) -> Tensor:
        with self.mode:
            values = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                return nn.Parameter(values, requires_grad=tensor.requires_grad)
            return values

    def spread(
        self, vlm: Vlm, grid: DeviceMesh | None, settings: Parallel, *, reference: bool
    ) -> tuple[Vlm, Vlm | None]:
        """The policy, and its reference if there is one, sharded over `grid` if there is one."""

        def sharded(whole: Vlm) -> Vlm:
            return whole if grid is None else replace(whole, fsdp_root=fsdp.wrap(whole.model, grid, settings))

        if not reference:
            return sharded(vlm), None
        return grpo.with_reference(vlm, sharded, dtype=fsdp.reference_dtype(settings))

    def pack(self, trees: Sequence[FakeTree], pixels: int) -> Pack:
        """A pack of trees of these sizes."""
        self._grids = [(1, *tree.grid) for tree in trees]
        targets = sum(sum(tree.answers) for tree in trees)
        layout = layout_of([(tree.text + tree.patches // 4, tree.answers) for tree in trees])
        with self.mode:
            whole = torch.zeros(targets, dtype=torch.long)
            return Pack(
                layout=layout,
                ids=torch.zeros(layout.length, dtype=torch.long),
                positions=torch.zeros(3, layout.length, dtype=torch.long),
                predictors=whole,
                targets=whole.clone(),
                sequence=whole.clone(),
                weights=torch.zeros(targets),
                sampler_logprobs=torch.zeros(targets),
                images=tuple(trees),
                grids=torch.zeros(len(trees), 3, dtype=torch.long),
                pixels=lambda tree, device: torch.zeros(tree.patches, pixels),
            )

    def counting(
        self, vlm: Vlm, reference: Vlm | None, optimizer: torch.optim.Optimizer
    ) -> AbstractContextManager[Any]:
        """Count from here on: what stands at first is weights, reference and optimiser state, made here."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        standing = {"optimizer": [x for state in optimizer.state.values() for x in state.values()]}
        if reference is not None:
            standing["reference"] = [*reference.model.parameters()]
        standing["weights"] = [*vlm.model.parameters()]
        for kind, tensors in standing.items():
            for tensor in tensors:
                self.ledger.count(tensor.detach(), kind)
        return self.ledger


def kinds(counts: Counter[str]) -> str:
    """Gigabytes by kind, for people."""
    return ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in counts.items() if size > 2**20)
