"""Writes the model card from the run: data, training, results and limits.

The card is public: it has no paths or addresses of the training machine.
"""

from collections.abc import Collection, Sequence
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

from rlcs.data.hub import cache_where_unreachable
from rlcs.model.source import BUILTIN, Source, find_source, origin_of
from rlcs.recipe.arms import ARMS, RL_ARMS, stages_behind
from rlcs.recipe.schema import Data, Teacher
from rlcs.recipe.table import summary_rows
from rlcs.report import findings
from rlcs.report.differences import differences
from rlcs.report.load_run import Run, number, part, read_object, read_rows, read_run
from rlcs.storage import DONE


def render(source: Source, name: str, model: Any, *, converted: bool, quantised: str | None = None) -> str:
    """The card's text: YAML metadata for the hub, then Markdown.

    `model` is the exported one, before it was `quantised` (`int8`, `int4`); `converted`: its precision is not
    that of the measurement.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # noqa: S701  Markdown, not HTML
        loader=PackageLoader("rlcs", "publish"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["python"] = dumps
    recipe, run = source.recipe, source.run and read_run(source.run)
    stages = stages_behind(source.arm or "sft_grpo")
    base = recipe.model.name if recipe else None
    licence: dict[str, Any] = {**base_licence(base or source.weights, source.revision)}
    results = findings.arm_results([run]) if run and source.checkpoint is None else []
    own = next((result for result in results if result.arm == source.arm), None)
    gaps = differences([run]) if results and run and source.arm == "sft_grpo" else []
    sources = [recipe.data.cold_start, recipe.data.rl] if recipe and source.arm != "base" else []
    data = ModelCardData(
        model_name=name,
        **licence,
        base_model=base if base and _on_hub(base) else None,
        datasets=sorted(filter(_on_hub, {each.partition("?")[0] for each in sources})) or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["rlcs", "reasoning", *(["grpo"] if source.arm in RL_ARMS else [])],
        eval_results=_index(own, shown(recipe.data.test), recipe.name) if own and recipe else None,
    )
    body = environment.get_template("card.md.j2").render(
        name=name,
        base=shown(base) if base else None,
        builtin=base in BUILTIN,
        story=ARMS[source.arm].story if source.arm else None,
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        licence=licence.get("license_name") or licence.get("license"),
        recipe=recipe,
        arm=source.arm,
        arms=ARMS,
        data=_data_rows(recipe.data, recipe.teacher, run, stages) if recipe and run else [],
        converted=converted,
        quantised=quantised,
        choices=_choices(summary_rows(recipe), stages) if recipe else [],
        stages=_times(run, stages) if run else [],
        training=_training(source) if source.run and source.step is not None else None,
        made_by=version("rlcs"),
        transformers=version("transformers"),
        versions=part(run.summary, "versions") if run else {},
        results=results,
        own=own,
        gap=next((each for each in gaps if (each.arm, each.against) == ("sft_grpo", "base")), None),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _training(source: Source) -> dict[str, Any]:
    """The step of a model's last stage, how it was chosen, and its measurement while it trained."""
    assert source.run is not None and source.arm is not None, "of a run"
    stage = source.run / source.arm
    rows = {row.get("step"): row for row in read_rows(stage / "validation.jsonl")}
    done = {} if source.checkpoint else read_object(stage / DONE)
    return {
        "stage": ARMS[source.arm].stage,
        "step": source.step,
        "rule": done.get("rule"),
        "row": rows.get(source.step),
    }


def shown(name: str) -> str:
    """The public name of a model or data source: a hub id or built-in name, or the last part of a path."""
    if name.startswith("builtin") or _on_hub(name.partition("?")[0]):
        return name
    return Path(name).name


def _on_hub(name: str) -> bool:
    """Whether a name has the form owner/name of the hub and is no local path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists() and not name.startswith(".")


def base_licence(base: str, revision: str | None) -> dict[str, str]:
    """The licence in the base model's card; empty where no card is available."""
    from huggingface_hub import ModelCard, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    base = origin_of(base)
    path = Path(find_source(base).weights) / "README.md"
    try:
        if not path.is_file():
            with cache_where_unreachable(base):
                path = Path(hf_hub_download(base, "README.md", revision=revision))
        data = ModelCard.load(path).data.to_dict()
    except (OSError, ValueError, HfHubHTTPError):  # offline, no card, or one that is not YAML
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if key in data}


def _index(own: findings.ArmResult, test: str, study: str) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=test.partition("?")[0],
            dataset_name=f"{study}: held-out problems",
            dataset_args={"source": test, "problems": own.n},
            metric_type="accuracy",
            metric_name=f"accuracy, 95% Wilson interval [{own.low:.3f}, {own.high:.3f}]",
            metric_value=round(own.accuracy, 4),
        )
    ]


def _data_rows(data: Data, teacher: Teacher, run: Run, stages: Collection[str]) -> list[tuple[str, str, str]]:
    """The (use, source, number) of the data of a model's stages and of its measurement."""
    counts = part(run.summary, "counts")
    rows = []
    if "cold_start" in stages:
        rows.append(("cold start", f"`{shown(data.cold_start)}`, {_authors(run, teacher)}", _made(run)))
    if set(stages) & set(RL_ARMS):
        rows.append(("reinforcement learning", f"`{shown(data.rl)}`", _many(number(counts, "rl"))))
    return [*rows, ("held-out measurement", f"`{shown(data.test)}`", _many(number(counts, "test")))]


def _authors(run: Run, teacher: Teacher) -> str:
    """Who wrote the demonstrations: the data itself, the teacher that was asked, or both."""
    who = f"`{teacher.who if teacher.who == 'builtin' else shown(teacher.model or '')}`"
    given, sampled = number(run.cold_start, "given"), number(run.cold_start, "asked")
    authors = [f"{given:,.0f} with the demonstrations of that data"] if given else []
    authors += [f"{sampled:,.0f} answered by {who}"] if sampled else []
    return " and ".join(authors) or "by an author who is not recorded"


def _made(run: Run) -> str:
    """How many demonstrations there are, and of how many answers they are those that were kept."""
    kept, tried = number(run.cold_start, "kept"), number(run.cold_start, "asked")
    return _many(kept) + (f" kept of {_many(tried)} asked" if tried else "")


def _choices(rows: Sequence[tuple[str, str]], stages: Collection[str]) -> list[tuple[str, str]]:
    """The run's main choices, without private ones and those of stages that are not among the model's."""
    private = ("model", "arms", "cold-start data", "cold-start teacher", "RL data", "test set")
    others: tuple[str, ...] = () if "sft" in stages else ("SFT",)
    others += () if "cold_start" in stages else ("chain of thought",)
    others += () if set(stages) & set(RL_ARMS) else ("RL", "reward")
    return [(name, value) for name, value in rows if name not in private and not name.startswith(others)]


def _many(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:,.0f}"


def _times(run: Run, stages: Sequence[str]) -> list[tuple[str, str]]:
    """The (stage, minutes) of a model's stages."""
    seconds = part(run.summary, "seconds")
    known = [(stage, number(seconds, stage)) for stage in stages]
    return [(stage.replace("_", " "), f"{value / 60:.1f}") for stage, value in known if value is not None]
