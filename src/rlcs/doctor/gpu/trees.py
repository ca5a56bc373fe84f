"""Checks logprobs and gradients of packed trees against plain ones, on random models with real layers.

Plain means: every answer after a copy of its prompt, through the attention of transformers, with positions
computed by the model itself. What packing may differ by follows from two plain kernels on the same weights:
three times what they differ by.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlcs.doctor.gpu import Check, Setting
from rlcs.doctor.gpu.models import make_chat, random_tree, random_vlm, shapes
from rlcs.model.chat import Chat
from rlcs.model.loading import default_device, give_back_memory
from rlcs.model.packing import pack
from rlcs.model.parity_check import attention_of, plain_logprobs
from rlcs.model.policy import score
from rlcs.model.vlm import Vlm
from rlcs.records.trees import Tree

FACTOR = 3.0
LEAST = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (4e-3, 3e-2)}
"""Differences of logprobs (nats, mean of an answer) and of gradients (relative) that are rounding anyway."""
Found = tuple[list[Tensor], list[Tensor]]
"""Logprobs of each answer, and gradients."""


def check(setting: Setting) -> Check:
    """Compare for each model and number format."""
    device = torch.device("cpu") if setting.cpu else default_device()
    values: dict[str, float] = {}
    lines, failed = [], []
    for shape in shapes(setting):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{shape.label} {str(dtype).removeprefix('torch.')}"
            vlm = random_vlm(shape, device, dtype)
            chat = make_chat(vlm)
            # cuDNN rounds float32 to 10 bits where it likes: in one path, and not in the other.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                gaps, limits = compare(vlm, chat, trees(chat, small=setting.cpu))
            del vlm
            give_back_memory()
            values |= {f"{name} nats": gaps[0], f"{name} nats limit": limits[0]}
            values |= {f"{name} gradient": gaps[1], f"{name} gradient limit": limits[1]}
            line = f"{name}: {gaps[0]:.1e} nats (limit {limits[0]:.1e})"
            line += f", gradient {gaps[1]:.2%} (limit {limits[1]:.2%})"
            lines.append(line)
            if not (gaps[0] <= limits[0] and gaps[1] <= limits[1]):
                failed.append(line)
    fix = "set model.attention=dense" if failed else ""
    return Check(ok=not failed, message="; ".join(failed or lines), fix=fix, values=values)


def trees(chat: Chat, *, small: bool) -> list[Tree]:
    """Trees with one image, with two of other sizes, and with none."""
    if small:
        return [
            random_tree(chat, [(168, 168)], [9, 14, 5], seed=1),
            random_tree(chat, [(112, 84), (56, 140)], [11, 6], seed=2),
            random_tree(chat, [], [13, 7], seed=3),
        ]
    return [
        random_tree(chat, [(448, 448)], [97, 160, 33], seed=1),
        random_tree(chat, [(336, 224), (168, 560)], [128, 61], seed=2),
        random_tree(chat, [], [140, 72], text=150, seed=3),
    ]


def compare(vlm: Vlm, chat: Chat, given: Sequence[Tree]) -> tuple[tuple[float, float], tuple[float, float]]:
    """How far packed logprobs (nats) and gradients are from plain ones, and how far they may be."""
    packed = _packed(vlm, chat, given)
    plain = _plain(vlm, chat, given, "sdpa")
    other = _plain(vlm, chat, given, "eager")
    least = LEAST[vlm.model.dtype]
    rounding = _gaps(other, plain)
    limits = (max(FACTOR * rounding[0], least[0]), max(FACTOR * rounding[1], least[1]))
    return _gaps(packed, plain), limits


def _gaps(found: Found, plain: Found) -> tuple[float, float]:
    """The largest mean difference of an answer's logprobs, and the relative difference of all gradients."""
    nats = [float((a - b).abs().mean()) for a, b in zip(found[0], plain[0], strict=True)]
    difference = torch.stack([(a - b).float().norm() for a, b in zip(found[1], plain[1], strict=True)]).norm()
    size = torch.stack([b.float().norm() for b in plain[1]]).norm()
    gaps = (max(nats), float(difference / size))
    return (gaps[0], gaps[1]) if all(gap == gap for gap in (*nats, gaps[1])) else (float("inf"),) * 2


def _packed(vlm: Vlm, chat: Chat, given: Sequence[Tree]) -> Found:
    """All trees in one pack."""
    packed = pack(given, chat.patches)
    logprobs = score(vlm, packed).logprobs
    (logprobs * packed.weights.to(vlm.device)).sum().backward()
    lengths = [len(branch.ids) for tree in given for branch in tree.branches]
    return list(logprobs.detach().split(lengths)), _take_gradients(vlm)


def _plain(vlm: Vlm, chat: Chat, given: Sequence[Tree], kernel: str) -> Found:
    """One answer after the other, all through this kernel of transformers."""
    found = []
    with attention_of(vlm, kernel):
        for tree in given:
            for index, branch in enumerate(tree.branches):
                logprobs = plain_logprobs(vlm, chat, tree, index)
                weights = torch.tensor(branch.weights, device=vlm.device)
                (logprobs * weights).sum().backward()
                found.append(logprobs.detach())
    return found, _take_gradients(vlm)


def _take_gradients(vlm: Vlm) -> list[Tensor]:
    """The gradients so far, which start at zero again."""
    taken = [p.grad if p.grad is not None else torch.zeros_like(p) for _, p in vlm.parameters()]
    vlm.model.zero_grad(set_to_none=True)
    return taken
