"""Sampling defaults of a model's own (`generation_config.json`), for requests that give none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlcs.model.source import find_source

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
}
"""Settings that rlcs does not have, and those of their values that change nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingDefaults:
    """What a request that leaves a setting out gets; where the folder has no value, OpenAI's default.

    `ignored` are settings of the folder that rlcs does not have, as `top_k 20`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people."""
        limit = f", max_tokens {self.max_tokens:,}" if self.max_tokens else ""
        line = f"temperature {self.temperature:g}, top_p {self.top_p:g}{limit} where a request gives none"
        ignored = ", ".join(self.ignored)
        return f"{line}; the folder's {ignored} is not supported and ignored" if ignored else line


def read_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    """Read the settings of a `generation_config.json`; `do_sample: false` is greedy.

    Values that cannot be used are left out and named in `ignored`.
    """

    def number(name: str, low: float, high: float) -> Any:
        value = config.get(name)
        usable = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return value if usable else None

    temperature = 0.0 if config.get("do_sample") is False else number("temperature", 0, 2)
    top_p, longest = number("top_p", 1e-9, 1), number("max_new_tokens", 1, 2**31)
    unused = {name: config.get(name) for name in _NEUTRAL}
    if temperature != 0:
        unused |= {"temperature": config.get("temperature")} if temperature is None else {}
        unused |= {"top_p": config.get("top_p")} if top_p is None else {}
    given = {name: value for name, value in unused.items() if value is not None}
    ignored = [f"{name} {value}" for name, value in given.items() if value not in _NEUTRAL.get(name, ())]
    return SamplingDefaults(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        max_tokens=None if longest is None else int(longest),
        ignored=tuple(ignored),
    )


def defaults_of(name: str, config: Mapping[str, Any] | None = None) -> SamplingDefaults:
    """The defaults of a model by its name; `config` is its `generation_config.json` if that is loaded.

    A model of a run answers as it was measured, which is also what its export says.
    """
    source = find_source(name)
    if source.recipe is not None:
        measured = source.recipe.eval
        limit = measured.max_new_tokens
        return SamplingDefaults(temperature=measured.temperature, top_p=measured.top_p, max_tokens=limit)
    if config is not None:
        return read_defaults(config)
    from transformers import GenerationConfig

    try:
        return read_defaults(GenerationConfig.from_pretrained(source.weights).to_dict())
    except (OSError, ValueError):  # there is none, or it cannot be read
        return SamplingDefaults()
