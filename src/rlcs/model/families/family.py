"""What rlcs must know about a family of models: the protocol that each file of this package fulfils."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlcs.model import attention, experts
from rlcs.model.chat_format import ChatFormat
from rlcs.model.patches import ImageProcessing
from rlcs.records import Positions


class Family(ABC):
    """One family of models; everything else in rlcs is the same for all of them.

    `model_type` is that of the configurations. The three parts are patterns on the names of parameters; each
    parameter belongs to exactly one. `default_system` is the system message that the chat template inserts
    when there is none; None: no system turn. `vllm_marks_images`: vLLM expands an image's placeholder to its
    tokens with those before and after them (`ChatFormat.image_start`, `image_end`), not to its own alone.
    `unused` are parameters through which neither text nor images go: they are kept as they are.
    """

    model_type: str
    vision_tower: str
    merger: str
    language_model: str
    experts: str | None = None
    router: str | None = None
    chat_format: ChatFormat
    default_system: str | None = None
    positions: Positions = "grid"
    unused: str | None = None
    vllm_marks_images: bool = False

    def complete(self, config: Any, written: Mapping[str, Any], where: str) -> None:  # noqa: B027 - optional
        """Correct what transformers makes of a published configuration, whose file holds what is `written`.

        Raises ModelError, naming `where`, for a model of the family that is not supported.
        """

    def install(self, model: PreTrainedModel) -> None:
        """Make the tokens of a model see each other by plans (see `model.attention`), and routers replay."""
        attention.install(model)
        if self.router is not None:
            experts.install(model)

    @abstractmethod
    def image_processing(self, processor: Any, *, min_pixels: int, max_pixels: int) -> ImageProcessing:
        """How an image becomes a grid and patches; the bounds are set on the processor too.

        `processor` is the family's whole processor, of transformers. Raises ModelError for a processor that
        computes otherwise than we do.
        """

    @abstractmethod
    def pixel_bounds(self, processor: Any) -> tuple[int, int]:
        """The bounds that a processor has: `image_processing` with these changes nothing."""

    def save_as_published(self, model: PreTrainedModel) -> None:  # noqa: B027 - optional
        """Make a model be saved with its weights as the published files have them: vLLM reads no others."""

    def note_bounds(self, config: Any, processor: Any) -> None:  # noqa: B027 - optional
        """Write those of a processor's bounds into a model's configuration that vLLM reads there."""

    @abstractmethod
    def vision_inputs(self, patches: Sequence[Tensor], grids: Tensor) -> dict[str, Any]:
        """The keywords of the model's forward for images: the patches and grid of each."""

    def text_inputs(self, ids: Tensor, image_token_id: int) -> dict[str, Any]:
        """Keywords by which the model's own forward finds images in plain rows of ids (B, L)."""
        return {"mm_token_type_ids": (ids == image_token_id).long()}

    def position_ids(self, positions: Tensor) -> Tensor:
        """The model's `position_ids` for positions (3, L) of one row of tokens."""
        return positions[:, None] if self.positions == "grid" else positions[:1]

    def mergers(self, model: PreTrainedModel) -> list[nn.Module]:
        """What maps the hidden states of a vision tower to image tokens.

        Empty: what a frozen tower makes of an image cannot be kept between passes.
        """
        return []

    def tower_width(self, model: PreTrainedModel) -> int:
        """Numbers by which the tower describes a patch to each of the mergers."""
        return 0
