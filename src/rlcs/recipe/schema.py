"""The schema of a recipe: every key of a run with its default, unit and source; unknown keys are errors."""

from typing import Literal

from pydantic import model_validator

from rlcs.recipe.arms import MAIN_FIRST, ArmName, stages_behind
from rlcs.recipe.execution import Lora, Parallel, Trackers
from rlcs.recipe.sampling import ADAPTER_RANKS, Endpoint, EngineSettings, Rollouts, Server
from rlcs.recipe.section import (
    Above0,
    FolderName,
    NonNegative,
    Nucleus,
    Positive,
    Section,
    Seed,
    Share,
    Temperature,
    Warm,
    Whole,
)
from rlcs.recipe.stages import Grpo, Overlap, Sft
from rlcs.records import Sampling


class Model(Section):
    """The model that is trained."""

    name: str = "builtin"
    """A folder, a Hugging Face hub id, a run (`runs/mine`, one stage `runs/mine/sft`, a kept step
    `runs/mine@80`), or one of the tiny models that ship with rlcs: `builtin` (a Qwen2.5-VL), `builtin-hybrid`
    (a Qwen3.5, most of whose layers are gated delta nets)."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU and wherever the weights themselves train: in bfloat16 a
    weight of 0.02 changes by 6e-5 or not at all, and a step of RL is 1e-6. For fast work on exact weights see
    `parallel.compute_dtype`."""
    attention: Literal["auto", "tree", "flex", "dense"] = "auto"
    """How packed trees attend: `tree` (CPU), `flex` (GPU), `dense` (the plain reference)."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you have read that code."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    fused_loss: bool = False
    """Turn logits into their own gradients in place, and add the gradient of the head up in one tensor: less
    memory and traffic where the vocabulary is large, and results that differ by rounding."""
    router_loss: NonNegative | None = None
    """Weight of the loss that spreads tokens evenly over the experts of a mixture, in SFT and RL: that of the
    models' own code, of each tree of answers, whose prompt counts once for each answer. None: as the model's
    configuration says, `router_aux_loss_coef` where `output_router_logits` is true; published ones have it
    false, so that there is no such loss."""


class Prompts(Section):
    """The system prompt, the beginning of answers, and the length of prompts."""

    system: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    """System prompt of SFT, RL, evaluation and serving. None: the chat template's default."""
    rl_system: str | None = None
    """System prompt in RL only; None: the same as `system`. The paper's code sends none in RL."""
    thinking: bool | None = None
    """Whether an answer begins with an open `<think>` block or behind an empty one: what chat templates call
    `enable_thinking` (Qwen3.5). None: as the template does by default."""
    max_tokens: Positive = 2048
    """Longer prompts (images included) are left out and counted, never cut."""


class Images(Section):
    """Sizes of images in every stage."""

    min_pixels: Positive = 3136
    """Smaller images are enlarged to this area (28 x 28 pixels make one token; 32 x 32 in Qwen3-VL). Without
    effect for Gemma 4."""
    max_pixels: Positive = 1_204_224
    """Larger images are shrunk to this area: 1,204,224 pixels are 1,536 tokens (the paper's value). InternVL:
    tiles of 448 x 448 pixels (256 tokens) and the thumbnail have at most this area together: 6 of them; its
    own processor makes up to 13 (2,609,152 pixels). Gemma 4: all images get this area or less, 70, 140, 280,
    560 or 1,120 tokens of 48 x 48 pixels; 280 for this value, as in its own processor."""
    rl_min_pixels: Positive | None = None
    """`min_pixels` in RL only; None: the same. The paper's code enlarges to 262,144 in RL only."""
    decode_limit: Positive = 200_000_000
    """Images with more pixels in the file are refused before they are decoded; photos are scaled down."""
    workers: Whole = 4
    """Threads of each process that decode and resize images before they are needed; 0: none."""
    cache_gb: Above0 = 2.0
    """Memory of each process for decoded images: an image of 1,000 tokens takes 2.4 MB."""
    features_gb: NonNegative = 1.0
    """GPU memory of each process for what a frozen vision tower makes of a step's images: it then runs once
    in a step of RL; 0: once in every pass."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "Images":
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) is above max_pixels ({self.max_pixels})")
        if (self.rl_min_pixels or 0) > self.max_pixels:
            raise ValueError(f"rl_min_pixels ({self.rl_min_pixels}) is above max_pixels ({self.max_pixels})")
        return self


class Columns(Section):
    """The columns of a data source; they count before those of another tool's layout."""

    id: str = "id"
    """Missing: the row number is used."""
    question: tuple[str, ...] = ("question", "problem", "query")
    """The first of these that has a value."""
    images: tuple[str, ...] = ("images", "image")
    """The first of these that has a value; paths, data URLs, Base64 or embedded images, one or a list."""
    answer: tuple[str, ...] = ("answer", "solution")
    """The first of these that has a value."""
    response: tuple[str, ...] = ("response",)
    """With one of these a row is a demonstration."""
    choices: tuple[str, ...] = ("choices", "options")
    """Multiple choice: a list of texts, a mapping from letters, or a line for each (`A. ...`)."""


class Data(Section):
    """The sources of problems: a data file, a folder, a hub id, or `builtin:NAME?option=value&...`."""

    cold_start: str = "builtin:puzzles?split=train&count=1000&seed=1"
    """Problems (answered by the teacher) or demonstrations (used as they are) for SFT."""
    max_demonstrations: Positive | None = None
    """Most demonstrations that a run learns from, drawn at random by its seed. None: all that were kept."""
    rl: str = "builtin:puzzles?split=train&count=4000&seed=2"
    """Problems for GRPO."""
    rl_pass_rate: tuple[Share, Share] | None = None
    """Only RL problems with a `pass_rate` (of `problems.jsonl`, which distillation writes) in these bounds,
    both included: [0.01, 0.99] drops problems that the teacher never or always solves. None: all."""
    rl_blind: Literal["keep", "drop"] = "keep"
    """`drop`: RL problems that the base answers right with another problem's image are left out: those with a
    `blind_rate` (of `rlcs data difficulty --blind`) of 0.5 or more, and others by one greedy answer, which
    the run measures. In multiple choice that also takes those that are guessed by chance."""
    test: str = "builtin:puzzles?split=test&count=1000&seed=3"
    """Held-out problems on which every arm is measured."""
    split: str | None = None
    """Split of a hub data set; None: `train` for training sources, `test` for the test source."""
    image_root: str | None = None
    """Absolute image paths are allowed only under this folder; relative ones may start there too."""
    max_bad_share: Share = 0.01
    """Largest share of unusable rows; with more the run does not start."""
    overlap: Literal["warn", "drop", "refuse"] = "warn"
    """Training rows that are also in `test` (the same question on the same pixels). `warn`: they are counted
    before the run starts; `drop`: they are left out of the training too; `refuse`: the run does not start."""
    answers: Literal["unwrapped", "as_given"] = "unwrapped"
    """`unwrapped`: gold answers are taken out of boxes, tags and worked solutions, and rows whose gold answer
    nothing can match are not used; `as_given`: they stay as they are, for an own reward or a judge."""
    system: Literal["row", "recipe"] = "row"
    """The system prompt of a row that has one: `row`: its own, instead of `prompt.system` and
    `prompt.rl_system`; `recipe`: theirs, and the row's is left out."""
    columns: Columns = Columns()
    """Column names."""


class Filters(Section):
    """Flaws for which a right answer is rejected; the built-in teacher's answers are not filtered."""

    mixed_languages: bool = True
    """Reject an answer in which more than 1% of the letters are of a script foreign to the question."""
    repetition: bool = True
    """Reject an answer more than half of whose runs of 8 words occurred before."""
    leaks: bool = True
    """Reject an answer that mentions a gold or reference answer, which the model was not given."""
    min_chars: Whole = 0
    """Reject shorter answers."""
    max_chars: Positive | None = None
    """Reject longer answers. Answers that are cut off are always rejected."""


class Teacher(Server):
    """The model that writes the cold-start answers, and the choice of those that are kept."""

    kind: Literal["builtin", "endpoint", "local"] | None = None
    """`builtin`: the program that made the problem; `endpoint`: a server at `base_url`; `local`: a model that
    rlcs loads. None: `endpoint` with `base_url`, else `local` with `model`, else `builtin`."""
    base_url: str | None = None
    """Address of an `endpoint`, with the version: `http://localhost:8000/v1`."""
    model: str | None = None
    """The model's name on the server; for `local` a folder, a hub id, a run, or `builtin`."""
    rollout: EngineSettings = EngineSettings()
    """The engine of a `local` teacher: this process, or a vLLM that is started and stopped for it."""
    temperature: Temperature = 0.7
    """Sampling temperature of an endpoint or local teacher."""
    top_p: Nucleus = 1.0
    """Nucleus sampling."""
    max_tokens: Positive = 4096
    """Longest answer to one request."""
    wrong_share: Share = 0.25
    """Share of answers in which the built-in teacher misreads the image, to imitate real teachers."""
    max_samples: Positive = 1
    """Most answers sampled for each problem."""
    enough_kept: Whole = 1
    """Sampling of a problem ends with so many answers to keep. 0: all samples, for an unbiased pass rate."""
    token_budget: Positive | None = None
    """Most tokens of prompts and answers; then the run stops, and can go on with a higher budget."""
    cost_budget: Above0 | None = None
    """The same in money, by the prices."""
    keep: Literal["right", "all"] = "right"
    """`right`: rejection sampling, of responses in the data too: a final answer other than the gold one is
    left out. `all`: wrong answers are trained on too."""
    pick: Literal["first", "shortest", "diverse"] = "first"
    """Choice among several answers to keep: the first, the shortest, or those least alike."""
    max_kept: Positive = 1
    """Demonstrations kept for each problem at most."""
    chain: Literal["distilled", "reflection", "caption", "self_critic"] = "distilled"
    """Kind of chain of thought (arXiv 2505.22334): think step by step; reflect on mistakes and correct them;
    describe the image, then think; answer, criticise, improve."""
    format: Literal["plain", "think"] = "plain"
    """`plain`: reasoning that ends in a box; `think`: reasoning in `<think>` tags, then the box."""
    templates: str | None = None
    """Folder with Jinja2 templates (`caption/1.j2`, ...) that replace shipped ones of the same name."""
    filters: Filters = Filters()
    """Flaws for which a right answer is rejected."""

    @model_validator(mode="after")
    def _kind_has_its_settings(self) -> "Teacher":
        if self.who != "builtin" and not self.model:
            raise ValueError(f"a teacher of kind {self.who} needs model")
        if self.who == "endpoint" and not self.base_url:
            raise ValueError("a teacher of kind endpoint needs base_url")
        if self.who != "local" and self.rollout.engine != "local":
            raise ValueError(f"rollout.engine is for a teacher of kind local, and this one is {self.who}")
        if self.cost_budget is not None and self.cost(0, 0) is None:
            raise ValueError("cost_budget needs the prices: set prompt_price and completion_price")
        if 0 < self.enough_kept < self.max_kept:
            what = f"max_kept ({self.max_kept}) is above enough_kept ({self.enough_kept})"
            raise ValueError(f"{what}: raise enough_kept")
        return self

    @property
    def who(self) -> Literal["builtin", "endpoint", "local"]:
        """The kind of teacher: the given one, or what `base_url` and `model` imply."""
        return self.kind or ("endpoint" if self.base_url else "local" if self.model else "builtin")

    @property
    def endpoint(self) -> Endpoint:
        """The server of a teacher of that kind."""
        return self.at(str(self.base_url), str(self.model), section="teacher")


class Eval(Section):
    """Sampling in the measurement of every arm on `data.test`."""

    temperature: Temperature = 0.0
    """0: greedy."""
    top_p: Nucleus = 1.0
    """Nucleus sampling."""
    max_new_tokens: Positive = 2048
    """Longest answer in tokens."""
    max_rows: Positive = 256
    """Answers decoded at once."""
    blind: Literal["none", "other", "removed"] = "none"
    """Each model also answers every question without seeing its image, which shows what needs no image.
    `other`: it sees another problem's image, so that the prompt keeps its form; `removed`: it sees none."""

    def sampling(self, *, n: int = 1, seed: int = 0) -> Sampling:
        """The settings for sampling `n` answers to each problem."""
        chosen = self.model_dump(include={"temperature", "top_p", "max_new_tokens"})
        return Sampling(n=n, seed=seed, **chosen)


class Validation(Section):
    """Measurement while a stage trains: pass@1 and pass@k, graded like the final one. Off by default."""

    sft_every: Whole = 0
    """Steps of SFT between measurements, beside one before the first step and one after the last. 0: none."""
    grpo_every: Whole = 0
    """The same for steps of GRPO."""
    source: str | None = None
    """Problems with answers, in the forms of `data.rl`. None: the last `problems` of `data.rl`, which RL then
    does not train on. It is never `data.test`: what is chosen by its score would look too good there."""
    problems: Positive = 200
    """Problems that are measured at most: the first of `source`."""
    demonstrations: Whole = 50
    """The demonstrations of so many problems, the last ones and a tenth of all at most, are held out of SFT
    where `sft_every` is set, and their loss is measured. 0: none."""
    samples: Positive = 1
    """Answers to each problem. 1: greedy, for pass@1; k of them are sampled: pass@1 is their mean, and pass@k
    the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374)."""
    temperature: Warm = 1.0
    """Temperature of several samples."""
    top_p: Nucleus = 1.0
    """Nucleus sampling of several samples."""

    @model_validator(mode="after")
    def _is_on_where_it_is_set(self) -> "Validation":
        if not self.on and self.model_fields_set - {"sft_every", "grpo_every"} and self != Validation():
            raise ValueError(
                "nothing is measured: set validation.sft_every or validation.grpo_every, to 10 say"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether any stage is measured while it trains."""
        return self.sft_every > 0 or self.grpo_every > 0

    @property
    def held_out(self) -> int:
        """How many of the problems of `data.rl` are taken out of it."""
        return self.problems if self.on and self.source is None else 0

    def sampling(self, *, max_new_tokens: int, seed: int) -> Sampling:
        """The settings for sampling the answers to each problem."""
        one = self.samples == 1
        return Sampling(
            n=self.samples,
            temperature=0.0 if one else self.temperature,
            top_p=1.0 if one else self.top_p,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )


class Study(Section):
    """The arms that `rlcs run` trains and measures (other commands name their own), and the trial before."""

    arms: tuple[ArmName, ...] = ("base", "sft", "sft_grpo")
    """`base` and one that is trained, or more. `sft` beside `sft_grpo` is only measured, as it is trained
    anyway; `grpo`, RL without a cold start, doubles the time: `rlcs ablate` and `rlcs quickstart` add it.
    `mixed`: one stage, whose steps learn from the reward and from demonstrations (`grpo.also`)."""

    preflight: Literal["quick", "full", "off"] = "quick"
    """What is tried before anything is trained. `quick`: every stage in small; the engine answers a question,
    and vLLM, started for it, another one with new weights, as after a step of RL; then it measures the base.
    `full`: these answers may be as long as any of the run."""

    @model_validator(mode="after")
    def _has_the_base_and_another(self) -> "Study":
        if "base" not in self.arms or len(set(self.arms)) < 2:
            raise ValueError("the arms are base and at least one of sft, grpo, sft_grpo, mixed")
        return self

    @property
    def main(self) -> ArmName:
        """The arm whose model is exported by default."""
        return next(arm for arm in MAIN_FIRST if arm in self.arms)

    @property
    def cold_starts(self) -> bool:
        """Whether any arm learns from demonstrations."""
        return any("cold_start" in stages_behind(arm) for arm in self.arms)

    @property
    def needs_sft(self) -> bool:
        """Whether any arm begins with SFT."""
        return any("sft" in stages_behind(arm) for arm in self.arms)


class Report(Section):
    """The report of a run."""

    gallery: Positive = 48
    """Held-out problems shown with image and every arm's answer."""


class Recipe(Section):
    """The whole recipe of a study: both stages, data, engines, measurement, report."""

    name: FolderName = "unnamed"
    """Name of the study in tables and titles."""
    seed: Seed = 0
    """Seeds data order, sampling and every other random choice."""
    model: Model = Model()
    """The model."""
    prompt: Prompts = Prompts()
    """Prompts."""
    images: Images = Images()
    """Image sizes."""
    data: Data = Data()
    """Data sources."""
    teacher: Teacher = Teacher()
    """Cold-start teacher."""
    lora: Lora = Lora()
    """Low-rank adapters."""
    sft: Sft = Sft()
    """Stage one."""
    grpo: Grpo = Grpo()
    """Stage two."""
    rollout: Rollouts = Rollouts()
    """The engine that samples."""
    eval: Eval = Eval()
    """Measurement."""
    validation: Validation = Validation()
    """Measurement while a stage trains."""
    study: Study = Study()
    """Arms."""
    report: Report = Report()
    """Report."""
    trackers: Trackers = Trackers()
    """Services that also get the metrics."""
    parallel: Parallel = Parallel()
    """How ranks share a model."""

    @model_validator(mode="after")
    def _adapters_are_possible(self) -> "Recipe":
        for name, stage in (("sft", self.sft), ("grpo", self.grpo)):
            if self.lora.rank and set(self.lora.parts) <= set(stage.freeze):
                raise ValueError(f"{name}.freeze leaves none of lora.parts to train")
        if self.lora.rank and self.rollout.lora == "adapter" and not self._vllm_takes_adapters:
            raise ValueError(
                "rollout.lora=adapter: vLLM takes adapters in the language model only, of rank "
                f"{ADAPTER_RANKS[-1]} at most: set lora.parts=[language_model], or rollout.lora=merged"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_can_be_chosen(self) -> "Recipe":
        chosen = (
            (f"sft.handover.rule={self.sft.handover.rule}", "sft", self.sft.handover.rule != "last"),
            ("grpo.keep=best", "grpo", self.grpo.keep == "best"),
        )
        for choice, stage, by_validation in chosen:
            if by_validation and not getattr(self.validation, f"{stage}_every"):
                raise ValueError(f"{choice} chooses by validation: set validation.{stage}_every, to 10 say")
        rule = self.sft.handover.rule
        if rule in ("best_pass_k", "most_signal") and self.validation.samples == 1:
            raise ValueError(
                f"sft.handover.rule={rule} compares answers to a problem: set validation.samples, to 4 say"
            )
        if rule == "probe":
            self._probe_is_possible()
        if self.validation.on and self.validation.source == self.data.test:
            raise ValueError(
                "validation.source is data.test: a model that is chosen by its score there would look too "
                "good; name other problems, or leave validation.source out"
            )
        return self

    def _probe_is_possible(self) -> None:
        handover, steps = self.sft.handover, self.grpo.steps
        if "sft_grpo" not in self.study.arms:
            raise ValueError(
                "sft.handover.rule=probe tries RL from checkpoints of SFT, and no arm goes on with RL: add "
                "sft_grpo to study.arms, or choose another rule"
            )
        if handover.most_steps > handover.most_share * steps:
            raise ValueError(
                f"sft.handover.rule=probe may take {handover.most_steps:,} of {steps:,} steps of RL, more "
                f"than sft.handover.most_share ({handover.most_share:g}): lower sft.handover.round_steps, or "
                "raise grpo.steps or most_share"
            )

    @model_validator(mode="after")
    def _other_losses_have_an_arm(self) -> "Recipe":
        self.grpo.require_arms(self.study.arms)
        return self

    @model_validator(mode="after")
    def _can_overlap(self) -> "Recipe":
        grpo, key = self.grpo, f"grpo.overlap={self.grpo.overlap}"
        if grpo.overlap in (None, "none"):
            return self
        if self.rollout.engine != "vllm_server":
            raise ValueError(
                f"{key} needs an engine that samples while this process trains: set "
                f"rollout.engine=vllm_server (now {self.rollout.engine}), or leave grpo.overlap out"
            )
        if grpo.loss_average == "micro_batch":
            raise ValueError(
                f"{key} packs groups as they arrive, and with grpo.loss_average=micro_batch the gradient "
                "depends on what lies in a pack: set grpo.loss_average=token, or grpo.overlap=none"
            )
        if grpo.overlap == "one_step_off" and self.rollout.importance_cap is None:
            raise ValueError(
                f"{key} is corrected by importance weights: set rollout.importance_cap, to 2 say"
            )
        if grpo.overlap == "one_step_off" and grpo.optimizer_steps > 1 and grpo.old_logprobs == "sampler":
            raise ValueError(
                f"{key} with several optimiser steps needs grpo.old_logprobs=policy: the sampler's logprobs "
                "are those of older weights, and clipping would hold the policy near them"
            )
        return self

    @property
    def overlap(self) -> Overlap:
        """What goes on while the engine samples: as `grpo.overlap` says, or what is possible."""
        if self.grpo.overlap is not None:
            return self.grpo.overlap
        possible = self.rollout.engine == "vllm_server" and self.grpo.loss_average != "micro_batch"
        return "on_policy" if possible else "none"

    @property
    def learner(self) -> Model:
        """The model as a training stage loads it."""
        exact = self.model.dtype == "auto" and not self.lora.rank
        return self.model.model_copy(update={"dtype": "float32"}) if exact else self.model

    @property
    def _vllm_takes_adapters(self) -> bool:
        parts = set(self.lora.parts) - set(self.grpo.freeze)
        return parts == {"language_model"} and self.lora.rank <= ADAPTER_RANKS[-1]

    @property
    def samples_by_adapters(self) -> bool:
        """Whether vLLM gets the adapters of LoRA, not a merged model."""
        wanted = self.rollout.engine != "local" and self.lora.rank > 0 and self.rollout.lora != "merged"
        return wanted and self._vllm_takes_adapters
