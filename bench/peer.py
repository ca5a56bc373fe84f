"""TRL's side of the measurement: its own `GRPOTrainer.train`, watched at its own methods.

Everything is TRL's default but what makes the two sides do the same work: fp32, no gradient
checkpointing (neither side has it), the KL penalty without TRL's importance weight (ours has none),
one optimiser step a rollout, fixed rewards, forced lengths.
"""

import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils.logging import disable_progress_bar
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from bench.meter import Meter
from bench.shapes import SEED, Case, grpo_settings, rewards
from rlcs.model.chat_format import CHATML
from rlcs.recipe.schema import Prompts
from rlcs.records import Problem


class ForcedLengths(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Ends every row at its length and nowhere else, and bans vision tokens, as our engine does."""

    def __init__(self, lengths: Sequence[int], prompt: int, *, end_id: int, banned: Sequence[int]) -> None:
        self._lengths = torch.tensor(lengths)
        self._prompt = prompt
        self._end = end_id
        self._banned = torch.tensor([*banned, end_id])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) of the next token."""
        ending = self._lengths == input_ids.shape[1] - self._prompt + 1
        own = scores[ending, self._end]
        scores = scores.index_fill(1, self._banned, float("-inf"))
        if ending.any():
            scores[ending] = float("-inf")
            scores[ending, self._end] = own
        return scores


class WatchedTrainer(GRPOTrainer):
    """TRL's trainer, with a meter at its phases and a pipe that says when a step may start."""

    meter: Meter | None = None
    _updating = False

    def watch(self, case: Case, pipe: Connection) -> None:
        """Obey `pipe` and answer each step with what was measured."""
        self.case, self.pipe = case, pipe
        tokenizer = self.processing_class.tokenizer
        self._end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        others = ("<|im_start|>", "<|endoftext|>")
        self._banned_ids = [tokenizer.convert_tokens_to_ids(t) for t in (*CHATML.vision, *others)]
        self._generate_as_ever = self.model.generate
        self.model.generate = self._generate_forced
        self.add_callback(_StepEnd(self))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """A step begins: TRL reads its rows (and decodes their images) here."""
        if self.state.global_step < self.case.steps:
            self.meter = Meter(memory=bool(self.pipe.recv()), cpu_time=self.case.cpu_time).__enter__()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        group = self.case.shape.group
        self._row_lengths = [row["lengths"][i % group] for i, row in enumerate(inputs)]
        return super()._generate_and_score_completions(inputs)

    def _generate_forced(self, **inputs: Any) -> Tensor:
        prompt = inputs["input_ids"].shape[1]
        forced = ForcedLengths(self._row_lengths, prompt, end_id=self._end_id, banned=self._banned_ids)
        output: Tensor = self._generate_as_ever(**inputs, logits_processor=LogitsProcessorList([forced]))
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        assert self.meter is not None, "a step has begun"
        generate: Any = super()._generate_single_turn
        with self.meter.phase("rollout"):
            completion_ids, logprobs = generate(*args, **kwargs)
        assert [len(ids) for ids in completion_ids] == self._row_lengths, "lengths are forced"
        return completion_ids, logprobs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or self.meter is None:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.meter.phase("logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The update begins with the first loss and ends with the optimiser step."""
        if self.meter is not None and not self._updating:
            self._updating = True
            self.meter.begin("update")
        return super().compute_loss(*args, **kwargs)

    def finish_step(self) -> None:
        """The optimiser has stepped."""
        assert self.meter is not None, "a step has begun"
        self.meter.end()
        self.meter.__exit__(None, None, None)
        self._updating = False
        self.pipe.send(self.meter.measured)


class _StepEnd(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: WatchedTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """After optimiser step and clearing of gradients."""
        self._trainer.finish_step()


def main(pipe: Connection, case: Case) -> None:
    """Run a step for every word that comes through the pipe, and answer with what was measured."""
    torch.set_num_threads(case.threads)
    disable_progress_bar()
    trainer = make_trainer(case)
    trainer.remove_callback(PrinterCallback)
    trainer.watch(case, pipe)
    pipe.send("ready")
    trainer.train()


def make_trainer(case: Case) -> WatchedTrainer:
    """TRL's trainer for a case."""
    os.environ["WANDB_DISABLED"] = "true"
    settings = grpo_settings(case)
    rows = case.shape.prompts * case.shape.group
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="bench-"),
        per_device_train_batch_size=rows // case.packs,
        gradient_accumulation_steps=case.packs,
        num_generations=case.shape.group,
        max_completion_length=case.longest,
        max_steps=case.steps,
        temperature=settings.temperature,
        beta=settings.kl.coefficient,
        epsilon=settings.clip_low,
        loss_type="dapo",
        use_bias_correction_kl=False,
        learning_rate=settings.optimizer.lr,
        lr_scheduler_type="constant",
        weight_decay=settings.optimizer.weight_decay,
        max_grad_norm=settings.optimizer.max_grad_norm,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        shuffle_dataset=False,
        seed=SEED,
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(case.folder, padding_side="left")
    return WatchedTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=fixed_reward,
        args=config,
        train_dataset=Dataset.from_list([dataset_row(case, p) for p in case.problems]),
    )


def fixed_reward(completions: list[Any], **columns: Any) -> list[float]:
    """The same rewards as on our side."""
    return rewards(len(completions))


def dataset_row(case: Case, problem: Problem) -> dict[str, Any]:
    """A problem in TRL's form: a chat, an image, and the lengths to force."""
    system = {"role": "system", "content": Prompts().system or ""}
    data = problem.images[0].data
    assert data is not None, "the bench keeps images in memory"
    return {
        "prompt": [system, {"role": "user", "content": problem.question}],
        "image": Image.open(io.BytesIO(data)).convert("RGB"),
        "lengths": list(case.lengths[problem.id]),
    }
