"""The control tokens and words around the turns and images of a conversation, by family."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How a family writes a conversation; names of control tokens, except where text is said.

    A turn is `turn_start`, the text of its role in `roles`, what was said, `turn_end`, the text `after_turn`;
    an answer begins behind `turn_start` and the assistant's role. `opening` stands before the first turn. An
    image is `image_start`, its tokens `image`, `image_end`, the text `after_image`. `never_sampled` (with all
    these but `turn_end`) stand for inputs: a model that samples one is broken. `strips`: texts lose the
    blanks around them.
    """

    opening: tuple[str, ...] = ()
    turn_start: str
    turn_end: str
    after_turn: str = "\n"
    roles: dict[str, str] = field(hash=False)
    image_start: str
    image: str
    image_end: str
    after_image: str = ""
    never_sampled: tuple[str, ...] = ()
    strips: bool = False

    @property
    def vision(self) -> tuple[str, ...]:
        """Tokens that stand for images and videos."""
        return (self.image_start, self.image_end, self.image, *self.never_sampled)

    @property
    def banned(self) -> tuple[str, ...]:
        """Tokens that no answer may contain."""
        return (*self.vision, self.turn_start)


CHATML = ChatFormat(
    turn_start="<|im_start|>",
    turn_end="<|im_end|>",
    roles={role: f"{role}\n" for role in ("system", "user", "assistant")},
    image_start="<|vision_start|>",
    image="<|image_pad|>",
    image_end="<|vision_end|>",
    never_sampled=("<|vision_pad|>", "<|video_pad|>"),
)
"""ChatML as Qwen-VL models use it."""
