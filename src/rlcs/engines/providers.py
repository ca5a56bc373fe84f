"""Chooses the fields of requests: by the recipe, a table of providers' quirks, and what servers refuse."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from rlcs.engines.replies import Fault, short
from rlcs.errors import EndpointError
from rlcs.recipe.sampling import Endpoint
from rlcs.records import Sampling

Names = dict[str, str | None]
"""Our fields of a request by the server's names; None: not sent."""

_REASONING = r"(^|/)(o[1-9]|gpt-([5-9]|[1-9]\d)(?![\w.-]*chat))"
QUIRKS: tuple[tuple[str, str, Names], ...] = (
    (r"(^|\.)openai\.com$", "", {"max_tokens": "max_completion_tokens"}),
    (
        r"(^|\.)openai\.(azure\.)?com$",
        _REASONING,
        {"max_tokens": "max_completion_tokens", "temperature": None, "top_p": None},
    ),
    # Since Opus 4.1 temperature and top_p exclude each other; since Opus 4.7 both are refused.
    (r"(^|\.)(anthropic|claude)\.com$", "", {"top_p": None, "seed": None}),
    (
        r"(^|\.)(anthropic|claude)\.com$",
        r"claude-[a-z]+-(4[-.][7-9](?!\d)|[5-9])|mythos|fable",
        {"temperature": None},
    ),
    (r"(^|\.)googleapis\.com$", "", {"seed": None, "n": None}),
    (r"(^|\.)mistral\.ai$", "", {"seed": "random_seed", "n": None}),
    (
        r"(^|\.)(moonshot\.(ai|cn)|kimi\.com)$",
        r"kimi-(k2\.[5-9]|k[3-9]|for-)|^k[3-9]",
        {"temperature": None, "top_p": None},
    ),
)
"""Patterns of host and model, in small letters, and the fields that the server names otherwise or refuses.

All rows that match count. A server that is not here gets everything; what it refuses is then left out."""

_REFUSED = re.compile(
    r"unsupported|not support|n't support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed"
    r"|forbidden|deprecated|cannot both|can't both|mutually exclusive|no longer|not available|not accepted"
    r"|cannot find field|not enabled|不支持|only the default|only \S+ is (allowed|supported)",
    re.IGNORECASE,
)
_BARE_LETTER = r"|(?:\b(?:argument|parameter|field|property)(?: supplied)?:? |^){}\b(?!')"
"""A name of one letter without quotes: `Unrecognized request argument supplied: n`, `n is not supported`."""
_OTHER_LIMIT = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
"""The two names of the field with the limit of tokens, each by the other."""
_NEUTRAL = {"top_p": 1.0, "n": 1}
"""Values that mean the same as the field's absence."""


class Fields:
    """The fields of the requests to one server; it learns from refusals."""

    def __init__(self, server: Endpoint) -> None:
        """Start with the recipe's settings and, where they leave it open, the table's."""
        request = server.request
        self._server = server
        self._is_renamed = False
        self.names: Names = {name: name for name in ("max_tokens", "temperature", "top_p", "seed", "n")}
        if request.quirks == "auto":
            host = (urlsplit(server.base_url).hostname or "").lower()
            for on_host, of_model, names in QUIRKS:
                if re.search(on_host, host) and re.search(of_model, server.model.lower()):
                    self.names |= names
        if request.max_tokens != "auto":
            self.names["max_tokens"] = request.max_tokens
        self.names |= dict.fromkeys(request.omit)

    def body(self, sampling: Sampling, seed: int | None) -> dict[str, Any]:
        """The fields beside model and messages; a greedy request has no seed."""
        values: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
        }
        if sampling.temperature > 0 and seed is not None:
            values["seed"] = seed
        named = {self.names[name]: value for name, value in values.items()}
        return {name: value for name, value in named.items() if name} | dict(self._server.request.extra)

    def learn(self, found: Fault, sent: Mapping[str, Any]) -> str:
        """Leave out or rename the field that a refusal names; say so in a sentence, "" if it names none.

        `sent` is the refused body. Raises EndpointError where only the user can decide.
        """
        blamed = _blamed(found, sent)
        if blamed is None:
            return ""
        ours = next((name for name, theirs in self.names.items() if theirs == blamed), None)
        if ours is None and blamed not in self._server.request.extra:
            return ""  # learnt meanwhile
        other = _OTHER_LIMIT.get(blamed)
        refused = bool(_REFUSED.search(f"{found.code} {found.message}"))
        if ours is None or self._server.request.quirks == "none":
            raise self._unsupported(found, blamed)
        if ours == "max_tokens" and (refused or (other and other in found.message)):
            if other is None or self._is_renamed or self._server.request.max_tokens != "auto":
                raise self._unsupported(found, blamed)
            self.names[ours], self._is_renamed = other, True
            return f"{self._where} refuses {blamed}: {other} is sent instead"
        if refused or ours == "seed" or sent[blamed] == _NEUTRAL.get(ours):
            self.names[ours] = None
            value = f"{blamed} = {sent[blamed]}"
            return f"{self._where} refuses {value}: it is left out, and the server's own value counts"
        raise self._unsupported(found, blamed)

    @property
    def _where(self) -> str:
        return urlsplit(self._server.base_url).hostname or "the server"

    def _unsupported(self, found: Fault, name: str) -> EndpointError:
        """The error that ends the run, with the keys that mend it."""
        key = self._server.key
        if name in self._server.request.extra:
            fix = f"take {name} out of {key('request.extra')}"
        elif other := _OTHER_LIMIT.get(name):
            fix = f"set {key('request.max_tokens')}={other}, or another limit of tokens"
        else:
            fix = f"give {name} another value, or leave it out: {key('request.omit')}=[{name}]"
        what = f"the server refuses the field {name} of every request ({found})"
        return EndpointError(what, where=self._where, fix=fix)


def _blamed(found: Fault, sent: Mapping[str, Any]) -> str | None:
    """The field of a request that a refusal (400, 422) is about, if it is one of its own."""
    names = [name for name in sent if name not in ("model", "messages")]
    if found.param in names:
        return found.param
    text = short(found.message)
    # Of several names ("Use 'max_completion_tokens' instead", "temperature and top_p cannot both") the first
    # counts that is quoted or, for long names, stands there at all; of two that exclude each other top_p.
    if re.search(r"both|exclusive", text) and {"temperature", "top_p"} <= sent.keys() and "top_p" in text:
        return "top_p"
    places = {}
    for name in names:
        bare = rf"|\b{re.escape(name)}\b" if len(name) > 1 else _BARE_LETTER.format(name)
        if place := re.search(rf"[\"'`]{re.escape(name)}[\"'`]{bare}", text):
            places[name] = place.start()
    return min(places, key=places.__getitem__) if places else None
