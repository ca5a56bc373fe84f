"""Says what is wrong with the files of a model that cannot be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from rlcs.errors import ModelError

_VOCABULARIES = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def damaged_weights(folder: Path) -> Path | None:
    """The first file of weights in a folder that cannot be opened; None where there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path
    return None


def require_tokenizer(source: str) -> None:
    """Raise ModelError for a folder without a vocabulary, of which transformers makes an empty tokenizer."""
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise ModelError(
            "the folder has no tokenizer (tokenizer.json, or a vocabulary)",
            where=source,
            fix="copy all files of the model, not the weights alone",
        )


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn the error of a chat template that cannot be read into ModelError."""
    try:
        yield
    except TemplateError as error:
        raise ModelError(
            f"the model's chat template cannot be read: {error}",
            where="chat_template.jinja",
            fix="copy it (or tokenizer_config.json, where it may stand) from the model again",
        ) from error
