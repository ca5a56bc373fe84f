"""The layouts of other tools: ShareGPT and LLaVA, chat messages, verl, TRL, Alpaca and more.

Each is recognised by the columns of a row and read into our own columns. Earlier turns of a conversation
become the history of a problem, its last user turn the question, an assistant turn at the end the response.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from rlcs.data.values import checked_text, first_filled, image_in, is_filled, shown, structured
from rlcs.records import IMAGE_SLOT, Turn

Fields = Mapping[str, Any]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What a layout reads from a row: values by the names of our columns, and the turns before the question.

    In `images`, None stands for the next image of the row's own column. `hint` belongs before the question.
    """

    values: Mapping[str, Any]
    history: tuple[Turn, ...] = ()
    images: tuple[Any, ...] = ()
    hint: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A layout of rows: the columns that it is recognised by, the others that it reads, and how.

    With `lists` its first column must hold a list. `alone`: only for rows without a question column of ours.
    `id` is a column that names the row. Without a name it is our own.
    """

    name: str
    needs: tuple[str, ...]
    read: Callable[[Fields], Converted]
    also: tuple[str, ...] = ()
    lists: bool = True
    alone: bool = False
    id: str = ""

    def fits(self, filled: Fields, *, has_question: bool) -> bool:
        """Whether a row with these values is of this layout."""
        if self.needs[0] not in filled or (self.alone and has_question):
            return False
        if not all(name in filled for name in self.needs):
            return False
        return not self.lists or isinstance(structured(filled[self.needs[0]]), list)


def recognise(
    filled: Fields, *, has_question: bool, among: "Sequence[Layout] | None" = None
) -> Layout | None:
    """The layout of another tool that a row has, by its columns with a value; None for our own columns.

    `has_question`: the row has a question in a column of ours. `among`: those of `possible`.
    """
    among = LAYOUTS if among is None else among
    return next((layout for layout in among if layout.fits(filled, has_question=has_question)), None)


def possible(filled: Collection[str]) -> tuple[Layout, ...]:
    """The layouts that rows with values in these columns may have."""
    return tuple(layout for layout in LAYOUTS if all(name in filled for name in layout.needs))


def may_be_read(columns: tuple[str, ...]) -> bool:
    """Whether rows with these columns may be of a layout that has a question of its own."""
    conversations = [layout for layout in LAYOUTS if layout.read not in (_earlier, _vlmevalkit)]
    return any(set(layout.needs) <= set(columns) for layout in conversations)


# ---------------------------------------------------------------------------------- turns

_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "ai", "answer"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOLS = ("tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from"), ("content", "value", "text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_IMG = re.compile(r"(?:Picture \d+: ?)?<img>([^<>\n]+)</img>")
"""An image in a text, as Qwen-VL and early versions of ms-swift wrote it."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")


def _turns(value: object) -> tuple[list[Turn], list[Any]]:
    """Read a list of messages, or of pairs of question and answer: the turns, and the images in them."""
    items = structured(value)
    if not isinstance(items, list):
        raise ValueError(f"a conversation must be a list of turns, not {shown(value)}")
    turns: list[Turn] = []
    images: list[Any] = []
    for number, item in enumerate(items, start=1):
        for role, content in _turns_of(item, f"turn {number}"):
            text, shown_images = _content(content, f"turn {number}")
            turns.append(Turn(role=role, text=text))
            images += shown_images
    return turns, images


def _turns_of(item: object, where: str) -> list[tuple[Role, Any]]:
    """What one entry of a conversation holds: a turn, or a pair of turns."""
    if isinstance(item, list | tuple) and len(item) == 2:
        return [("user", item[0]), ("assistant", item[1])]
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} must be a mapping with role and content, not {shown(item)}")
    key = first_filled(item, _ROLE_KEYS)
    if key is None:
        pairs = [(_ROLES[name], item[name]) for name in item if name in _ROLES and is_filled(item[name])]
        if [role for role, _ in pairs] != ["user", "assistant"]:
            raise ValueError(f"{where} has no role: none of {', '.join(_ROLE_KEYS)}")
        return pairs
    name = str(item[key]).strip().lower()
    if name in _TOOLS or is_filled(item.get("tool_calls")) or is_filled(item.get("function_call")):
        raise ValueError(f"{where} calls or is a tool: conversations with tools cannot be used")
    if name not in _ROLES:
        raise ValueError(f"{where} has an unknown role: {shown(item[key])}, not user, assistant or system")
    role, content = _ROLES[name], item.get(first_filled(item, _TEXT_KEYS) or "")
    reasoning = item.get(first_filled(item, _REASONING) or "")
    if role == "assistant" and isinstance(content, str) and isinstance(reasoning, str) and reasoning.strip():
        content = f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    return [(role, content)]


def _content(content: object, where: str) -> tuple[str, list[Any]]:
    """The text of a turn, with a slot for every image that stands in it, and these images."""
    if not is_filled(content):
        raise ValueError(f"{where} is empty")
    text, images = "", list[Any]()
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            images += _IMG.findall(part)
            text += _IMG.sub(IMAGE_SLOT, part)
            continue
        if not isinstance(part, Mapping):
            raise ValueError(f"{where} must hold texts and images, not {shown(part)}")
        kind = part.get("type") or next(
            (k for k in (*_TEXT_PARTS, *_IMAGE_PARTS) if is_filled(part.get(k))), ""
        )
        if kind in _TEXT_PARTS:
            text += checked_text(part.get("text") or "", f"text of {where}")
        elif kind in _IMAGE_PARTS:
            text += IMAGE_SLOT
            images.append(image_in(part))  # None: the next one of the row's image column
        else:
            raise ValueError(f"{where} has a part of type {shown(kind)}: only texts and images can be used")
    return checked_text(text, where), images


def _conversation(turns: list[Turn], images: list[Any], system: object = None) -> Converted:
    """Split a conversation into history, question and, if an assistant turn ends it, response."""
    if is_filled(system) and not any(turn.role == "system" for turn in turns):
        turns = [Turn(role="system", text=checked_text(system, "system message")), *turns]
    speakers = [turn.role for turn in turns if turn.role != "system"]
    if not speakers:
        raise ValueError("the conversation has no user turn")
    if speakers[0] == "assistant":
        raise ValueError("the conversation begins with an assistant turn, not with a question")
    for number, pair in enumerate(pairwise(speakers), start=2):
        if pair[0] == pair[1]:
            raise ValueError(f"two {pair[0]} turns follow each other (turns {number - 1} and {number})")
    values = {}
    if turns[-1].role == "assistant":
        *turns, answer = turns
        values["response"] = answer.text
        if images and IMAGE_SLOT in answer.text:
            raise ValueError("an image stands in the answer; only questions may have images")
    *history, question = turns
    if question.role != "user":
        raise ValueError("the conversation does not end with a user turn and its answer")
    values["question"] = question.text
    return Converted(values=values, history=tuple(history), images=tuple(images))


# ---------------------------------------------------------------------------------- layouts


def _chat(tool: str, column: str) -> Layout:
    """The layout of a conversation in one column."""

    def read(fields: Fields) -> Converted:
        turns, images = _turns(fields[column])
        return _conversation(turns, images, _system(fields))

    return Layout(name=f"{tool} ({column})", needs=(column,), read=read, also=_CHAT_COLUMNS)


def _system(fields: Fields) -> object:
    return fields.get(first_filled(fields, _SYSTEM) or "")


def _prompt(fields: Fields) -> Converted:
    """A `prompt` of text or messages, with a `completion` likewise."""
    turns, images = _as_turns(fields["prompt"], "user")
    if is_filled(fields.get("completion")):
        answer, more = _as_turns(fields["completion"], "assistant")
        turns, images = [*turns, *answer], [*images, *more]
    return _conversation(turns, images, _system(fields))


def _as_turns(value: object, role: Role) -> tuple[list[Turn], list[Any]]:
    if isinstance(structured(value), list):
        return _turns(value)
    return [Turn(role=role, text=checked_text(value, "prompt" if role == "user" else "completion"))], []


def _verl(fields: Fields) -> Converted:
    reward = structured(fields["reward_model"])
    if not isinstance(reward, Mapping):
        raise ValueError(f"reward_model must be a mapping with ground_truth, not {shown(reward)}")
    prompt = _prompt(fields)
    return replace(prompt, values={**prompt.values, "answer": reward.get("ground_truth")})


def _alpaca(fields: Fields) -> Converted:
    texts = [fields[name] for name in ("instruction", "input") if is_filled(fields.get(name))]
    question = "\n".join(checked_text(text, "instruction") for text in texts)
    turns, images = _turns(fields.get("history") or [])
    turns.append(Turn(role="user", text=question))
    if is_filled(fields.get("output")):
        turns.append(Turn(role="assistant", text=checked_text(fields["output"], "output")))
    return _conversation(turns, images, _system(fields))


def _earlier(fields: Fields) -> Converted:
    """Turns before a question that stands in a column of ours."""
    turns, images = _turns(fields.get("history") or [])
    pending = Turn(role="user", text="?")
    found = _conversation([*turns, pending], images, _system(fields) if "query" in fields else None)
    return Converted(values={}, history=found.history, images=found.images)


def _vlmevalkit(fields: Fields) -> Converted:
    letters = [name for name in map(chr, range(ord("A"), ord("Z") + 1)) if is_filled(fields.get(name))]
    values = {"choices": {name: fields[name] for name in letters}}
    hint = fields.get("hint")
    return Converted(values=values, hint=checked_text(hint, "hint") if is_filled(hint) else "")


_SYSTEM = ("system", "system_prompt")
_LETTERS = tuple(map(chr, range(ord("C"), ord("Z") + 1)))
_CHAT_COLUMNS = (*_SYSTEM, "tools")
LAYOUTS = (
    _chat("chat messages", "messages"),
    _chat("ShareGPT or LLaVA", "conversations"),
    _chat("ShareGPT", "conversation"),
    _chat("pairs of user and assistant", "texts"),
    Layout(name="verl (prompt, reward_model)", needs=("prompt", "reward_model"), read=_verl, lists=False),
    Layout(
        name="TRL (prompt, completion)",
        needs=("prompt",),
        read=_prompt,
        also=("completion", *_CHAT_COLUMNS),
        lists=False,
        alone=True,
    ),
    Layout(
        name="Alpaca (instruction, input, output)",
        needs=("instruction",),
        read=_alpaca,
        also=("input", "output", "history", *_SYSTEM),
        lists=False,
        alone=True,
    ),
    Layout(name="ms-swift (history, query)", needs=("history", "query"), read=_earlier, also=_SYSTEM),
    Layout(name="ms-swift (system, query)", needs=("system", "query"), read=_earlier, lists=False),
    Layout(name="", needs=("history",), read=_earlier),
    Layout(
        name="VLMEvalKit (question, A, B, ...)",
        needs=("question", "A", "B"),
        read=_vlmevalkit,
        also=("index", "hint", *_LETTERS),
        lists=False,
        id="index",
    ),
)
