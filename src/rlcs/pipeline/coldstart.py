"""The study of the cold start: does RL need one, of how many demonstrations, how long, and of which kind?

It is a grid of cells (`recipe.coldstart`), each with the same budget of RL from another model. What cells
have in common is made once: the demonstrations of each kind, one SFT for all its lengths, whose checkpoints
are kept, and every measurement of the same model. Every SFT and every cell is a run folder of its own, below
`sft/` and `cells/`, which resumes as runs do; a cell that is over has the marker `over.json`, and the same
command goes on behind the last one. Weights of what is over are removed, unless they are wanted.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rlcs.data.run_data import RunData
from rlcs.data.stored import all_answered
from rlcs.distributed import ALONE, World
from rlcs.errors import RunFolderError, TrainingError
from rlcs.evals.intervals import interval_of_mean
from rlcs.pipeline.blind import answered_blind
from rlcs.pipeline.data_checks import check_prompts
from rlcs.pipeline.demonstrations import make_demonstrations
from rlcs.pipeline.run_folder import claim, command, versions
from rlcs.pipeline.study import Study, dry_run
from rlcs.progress import Output
from rlcs.recipe.coldstart import GIVEN, NONE, Cell, Wanted, chains_of, lengths_of, plan, subset
from rlcs.recipe.loading import changed
from rlcs.recipe.schema import Recipe
from rlcs.report import coldstart as reporting
from rlcs.report.coldstart_results import GRID, read
from rlcs.report.pages import duration
from rlcs.signals import StopFlag, Stopped
from rlcs.storage import is_done, mark_done, read_json, read_jsonl, verify_done, write_json, write_jsonl
from rlcs.storage.locks import hold
from rlcs.train.validation import shares

log = logging.getLogger("rlcs")
OVER = "over.json"
"""The marker of a cell that is over, with how it ended."""


class CannotWin(Stopped):
    """Ends the RL of a cell that is behind the best one."""


class ColdStart:
    """One study of the cold start in its folder."""

    def __init__(
        self,
        recipe: Recipe,
        wanted: Wanted,
        folder: Path,
        *,
        data: RunData,
        output: Output,
        stop: StopFlag,
        world: World = ALONE,
    ) -> None:
        """Check that the folder is free for it. Raises RunFolderError if it has another recipe, UserError."""
        self.recipe, self.folder = recipe, folder
        self._wanted, self._output, self._stop, self._world = wanted, output, stop, world
        given = all_answered(data.cold_start)
        self._chains = chains_of(wanted, recipe, given=given)
        self._data = check_prompts(data, recipe)
        self._seen: dict[Path, object] = {}
        self._seconds: dict[str, list[float]] = {"cells": [], "sft": []}
        world.first(lambda: claim(folder, recipe, dry=True))

    def run(self) -> dict[str, Any]:
        """Run every cell that is not over; returns the result, which is also in coldstart.json."""
        with ExitStack() as stack:
            self._world.first(lambda: stack.enter_context(hold(self.folder)))
            self._world.first(lambda: claim(self.folder, self.recipe))
            kept = {chain: self._demonstrations(chain) for chain in self._chains}
            cells = self._world.first(lambda: self._plan({chain: len(rows) for chain, rows in kept.items()}))
            left = self._world.first(lambda: [cell for cell in cells if not self._is_over(cell)])
            if left and self.recipe.study.preflight != "off":
                folder = self.folder / "preflight"  # is never written
                dry_run(self.recipe, folder, data=self._data, output=self._output, stop=self._stop,
                        world=self._world)  # fmt: skip
            for cell in left:
                self._world.check(self._stop, f"before {cell.name}")
                started = time.monotonic()
                if cell.chain != NONE:
                    self._sft(cell, cells, kept[cell.chain])
                    started = time.monotonic()
                self._rl(cell, cells)
                self._seconds["cells"].append(time.monotonic() - started)
                self._world.first(partial(self._finish, cell, cells))
            return self._world.first(self._conclude)

    # --- what cells share

    def _demonstrations(self, chain: str) -> list[dict[str, Any]]:
        """The demonstrations of one kind, made once for all seeds."""
        folder, rows, recipe = self.folder / "demonstrations" / chain, self._data.cold_start, self.recipe
        if chain != GIVEN:
            recipe = changed(recipe, [f"teacher.chain={chain}"])
            if all(row.response is not None for row in rows):  # else the teacher writes what is missing
                rows = tuple(replace(row, response=None) for row in rows)
        make = partial(make_demonstrations, rows, recipe, folder, output=self._output, stop=self._stop)
        self._world.first(make)
        return self._world.first(lambda: read_jsonl(folder / "kept.jsonl"))

    def _plan(self, kept: Mapping[str, int]) -> tuple[Cell, ...]:
        """The cells, which are written into grid.json."""
        cells = plan(self._wanted, self.recipe, kept)
        path = self.folder / GRID
        before = read_json(path)["lengths"] if path.exists() else None
        lengths = list(lengths_of(self._wanted, self.recipe))
        if before not in (None, lengths):
            was = ",".join(f"{each:g}" for each in before)
            raise RunFolderError(
                f"the study in it has other lengths of SFT: {was} epochs",
                where=str(self.folder),
                fix=f"write --epochs {was}, or choose another --out",
            )
        facts = {
            "name": self.recipe.name,
            "demonstrations": {chain: self._facts(chain) for chain in kept},
            "lengths": lengths,
            "rl_steps": self.recipe.grpo.steps,
            "schedule": self.recipe.sft.optimizer.schedule,
            "warmup_steps": self.recipe.sft.optimizer.warmup_steps,
            "batch_size": self.recipe.sft.batch_size,
            "command": command(),
            "versions": versions(),
            "cells": [asdict(cell) | {"folder": cell.name, "sft": cell.sft} for cell in cells],
        }
        write_json(path, facts)
        cold = len(cells) // self._wanted.seeds - 1
        self._say(
            f"{len(cells)} cells: {self._wanted.seeds} x ({cold} cold starts and none), each with "
            f"{self.recipe.grpo.steps:,} steps of RL"
        )
        return cells

    def _facts(self, chain: str) -> dict[str, Any]:
        """What the demonstrations of one kind took."""
        folder = self.folder / "demonstrations" / chain
        stats = read_json(folder / "stats.json")
        facts = {name: stats.get(name) for name in ("problems", "asked", "kept", "cost")}
        return facts | {"seconds": read_json(folder / "done.json")["seconds"]}

    def _study(self, recipe: Recipe, folder: Path, *, data: RunData, words: list[str]) -> Study:
        """A run of the grid, whose folder is its own from now on: measurements of others are put there."""
        recipe = changed(recipe, ["study.preflight=off", *words])
        study = Study(recipe, folder, data=data, output=self._output, stop=self._stop, world=self._world)
        study.claim()
        return study

    def _sft(self, cell: Cell, cells: tuple[Cell, ...], kept: list[dict[str, Any]]) -> None:
        """Train the SFT that a cell starts from, with all its lengths, and measure the longest."""
        folder = self.folder / "sft" / cell.sft
        if self._world.first(lambda: is_done(folder / "eval" / "sft")):
            return
        lengths = sorted({each.steps: each.epochs for each in cells if each.sft == cell.sft}.items())
        keep, epochs = [steps for steps, _ in lengths], max(epochs for _, epochs in lengths)
        words = [
            f"seed={cell.seed}",
            f"sft.epochs={epochs}",
            f"sft.keep_steps={keep}",
            "study.arms=[base, sft]",
        ]
        study = self._study(self.recipe, folder, data=replace(self._data, rl=()), words=words)

        def prepare() -> None:
            if not is_done(folder / "cold_start"):
                chosen = subset(kept, cell.demonstrations, cell.seed)
                write_jsonl(folder / "cold_start" / "kept.jsonl", chosen)
                mark_done(folder / "cold_start", reads=["kept.jsonl"], seconds=0.0, kept=len(chosen))
            base = self.folder / "cells" / f"{NONE}-seed-{self.recipe.seed}" / "eval" / "base"
            self._share(base, folder / "eval" / "base")

        self._world.first(prepare)
        self._say(
            f"SFT on {cell.demonstrations:,} {cell.chain} demonstrations, seed {cell.seed}: "
            f"{keep[-1]:,} steps for {len(keep)} {'length' if len(keep) == 1 else 'lengths'}"
        )
        study.run()
        seconds = self._world.first(lambda: float(read_json(folder / "sft" / "done.json")["seconds"]))
        self._seconds["sft"].append(seconds / keep[-1])

    def _share(self, source: Path, target: Path) -> None:
        """Take the measurement of the same model over from another run, if it has been made there."""
        if is_done(source) and not target.exists():
            verify_done(source, self._seen)
            aside = target.with_name(f"{target.name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source, aside)
            aside.replace(target)

    # --- a cell

    def _rl(self, cell: Cell, cells: tuple[Cell, ...]) -> None:
        """Train one cell, and measure it before and after."""
        folder, sft = self.folder / "cells" / cell.name, self.folder / "sft" / cell.sft
        words = [f"seed={cell.seed}", "study.arms=[base, grpo]"]
        if cell.chain != NONE:
            self._world.first(lambda: verify_done(sft / "sft", self._seen))
            words += [f"model.name={sft / 'sft'}@{cell.steps}", "model.revision=null"]
        data = replace(self._data, cold_start=())
        first = self.folder / "cells" / f"{NONE}-seed-{self.recipe.seed}"
        if self.recipe.data.rl_blind == "drop" and folder != first:  # what the base answers blind
            blind, _ = self._world.first(partial(answered_blind, data, first))
            data, words = data.without({"rl": set(blind)}), [*words, "data.rl_blind=keep"]
        study = self._study(self.recipe, folder, data=data, words=words)

        def share() -> None:
            if cell.chain == NONE:
                self._share(first / "eval" / "base", folder / "eval" / "base")
            elif cell.steps == max(each.steps for each in cells if each.sft == cell.sft):
                self._share(sft / "eval" / "sft", folder / "eval" / "base")

        self._world.first(share)
        if self._wanted.early_stop and cell.chain != NONE:
            best = self._world.first(lambda: self._best(cell.seed, cells))
            study.after_validation = partial(_require_chance, best, self.recipe.grpo.steps)
        over: dict[str, Any] = {"how": "finished"}
        stopped = folder / "stopped.json"
        try:
            if not self._world.first(stopped.exists):
                study.run()
        except CannotWin as error:
            middle = -(-self.recipe.grpo.steps // 2)
            facts = {"how": "stopped", "why": error.what, "step": middle}
            self._world.first(lambda: write_json(stopped, facts))
        except TrainingError as error:
            if error.where == "grpo.reward":
                raise  # no answer can be scored, in any cell
            log.warning("%s: RL ended: %s", cell.name, error)
            over = {"how": "failed", "why": str(error)}
        if self._world.first(stopped.exists):
            over = self._world.first(lambda: read_json(stopped))
            words = [
                f"seed={cell.seed}",
                "data.rl_blind=keep",
                f"model.name={folder / 'grpo'}@{over['step']}",
                "model.revision=null",
            ]
            self._study(self.recipe, folder / "stopped", data=data, words=words).measure_base()
        self._world.first(lambda: write_json(folder / OVER, over))

    def _best(self, seed: int, cells: tuple[Cell, ...]) -> tuple[str, list[float]] | None:
        """The finished cell of a seed that is best in validation at the end of RL, and its right answers."""
        found = []
        for cell in (each for each in cells if each.seed == seed and self._is_over(each)):
            path = self.folder / "cells" / cell.name / "grpo" / "validation.jsonl"
            rows = read_jsonl(path) if path.exists() else []
            if rows and rows[-1]["step"] == self.recipe.grpo.steps:
                found.append((rows[-1]["accuracy"], cell.name, shares(rows[-1])))
        return max(found)[1:] if found else None

    def _is_over(self, cell: Cell) -> bool:
        return (self.folder / "cells" / cell.name / OVER).exists()

    def _finish(self, cell: Cell, cells: tuple[Cell, ...]) -> None:
        """Remove what no later cell needs, write the page, and say what was found and how long it takes."""
        left = [each for each in cells if not self._is_over(each)]
        if not self._wanted.keep_models:
            needed = {each.sft for each in left}
            for each in set(cells) - set(left):
                _remove_weights(self.folder / "cells" / each.name)
                if each.sft not in needed:
                    _remove_weights(self.folder / "sft" / each.sft)
        study = read(self.folder)
        self._conclude()
        untrained = {each.sft: each.steps for each in reversed(left) if each.chain != NONE}
        steps = sum(
            steps for name, steps in untrained.items() if not is_done(self.folder / "sft" / name / "sft")
        )
        seconds = self._seconds["cells"]
        rate = sum(self._seconds["sft"]) / max(1, len(self._seconds["sft"]))
        left_s = len(left) * sum(seconds) / len(seconds) + steps * rate
        text = f"cell {len(cells) - len(left)} of {len(cells)}: {reporting.outcome(study, cell.name)}"
        text += f", {seconds[-1]:.0f} s"
        self._say(f"{text}; about {duration(left_s)} left" if left else text)

    def _conclude(self) -> dict[str, Any]:
        return reporting.build(self.folder)

    def _say(self, text: str) -> None:
        if self._world.rank == 0:
            with Output(quiet=True, json=self._output.json).screen("coldstart", 0) as view:
                view.say(text, {"coldstart": text})


def cannot_win(start: Sequence[float], middle: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a cell in the middle of its RL is behind the best finished one, even if it gains as much again.

    Each argument has the share of right answers to each validation problem: of the cell before RL and in its
    middle, and of the best cell after RL. The forecast of a problem is `middle + (middle - start)`, or
    `middle` where the cell gained nothing; the cell cannot win if the 95% interval of the mean difference
    between forecast and best, paired by problem, is below zero. Learning slows down rather than speeding up,
    so the forecast favours the cell.
    """
    gains = fmean(middle) > fmean(start)
    moves = [m + (m - s if gains else 0.0) - b for s, m, b in zip(start, middle, best, strict=True)]
    return interval_of_mean(moves)[1] < 0


def _require_chance(
    best: tuple[str, list[float]] | None, steps: int, rows: Mapping[int, Mapping[str, Any]]
) -> None:
    """Raise CannotWin in the middle of RL if the cell cannot become as good as the best one."""
    if best is None or len(rows) != 2 or max(rows) == steps:
        return
    (_, start), (_, middle) = sorted(rows.items())
    if cannot_win(shares(start), shares(middle), best[1]):
        share = sum(best[1]) / len(best[1])
        raise CannotWin(
            f"{middle['accuracy']:.1%} right in the middle of RL, {start['accuracy']:.1%} before: it cannot "
            f"become as good as {best[0]} with {share:.1%} at its end"
        )


def _remove_weights(run: Path) -> None:
    """Remove the models and checkpoints of a run whose measurements are made."""
    for stage in ("sft", "grpo"):
        for name in ("checkpoints", "models", "final"):
            shutil.rmtree(run / stage / name, ignore_errors=True)
