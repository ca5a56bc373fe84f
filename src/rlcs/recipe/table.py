"""The table that is shown before a run starts: the choices that change results, defaults among them."""

from collections.abc import Collection
from pathlib import PurePath

from rlcs.recipe.arms import ARMS, RL_ARMS, ArmName
from rlcs.recipe.execution import Lora, Parallel
from rlcs.recipe.handover import Handover, Rule
from rlcs.recipe.objectives import Entropy, Sight
from rlcs.recipe.sampling import Rollouts
from rlcs.recipe.schema import Data, Eval, Images, Model, Prompts, Recipe, Teacher, Validation
from rlcs.recipe.stages import Grpo, Optimizer, Overlap, Reward, Sft, function_name

_TOKEN_PIXELS = 28 * 28
_ADVANTAGES = {
    "grpo": "(r - mean) / (std + 1e-6) of the group",
    "dr_grpo": "r - mean of the group (Dr. GRPO: no division by std)",
    "rloo": "r - mean of the others in the group (RLOO)",
    "pass_k": "each set of {} answers counts as its best one (pass@k training)",
}
_AVERAGES = {
    "token": "all tokens of the step count the same",
    "sequence": "mean of each answer's token mean",
    "constant": "sum / (answers x longest allowed answer)",
    "micro_batch": "token mean of each pack: depends on the packing, as the paper's code does",
    "example": "mean of each response's token mean",
}
_LOSSES = {
    "grpo": "clipped token ratios (GRPO)",
    "gspo": "clipped sequence ratios (GSPO)",
    "cispo": "clipped detached weights (CISPO)",
    "sapo": "a soft gate on token ratios (SAPO)",
    "dppo": "no gradient where a token's probability has moved far (DPPO)",
}

_RULES: dict[Rule, str] = {
    "best_pass_1": "is best in validation",
    "best_pass_k": "has the best pass@k in validation",
    "most_signal": "leaves most groups with right and wrong answers in validation",
}
_OVERLAPS: dict[Overlap, str] = {
    "none": "nothing; a step learns when all its answers are there",
    "on_policy": "groups are learnt from as they arrive (same gradient)",
    "one_step_off": "groups are learnt from as they arrive; the next step is sampled by weights one step old",
}

_ORDERS = {
    "signal": "by their estimated pass rate, nearest to 0.5 first (Thompson sampling); 1 in 8 shuffled",
    "easy_first": "by their estimated pass rate, from 0.8 to 0.2 over the stage; 1 in 8 shuffled",
}


def summary_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """The rows (choice, value) of the table, in the order of a run."""
    adapters = "as adapters" if recipe.samples_by_adapters else "merged"
    return [
        ("recipe", f"{recipe.name}, seed {recipe.seed}"),
        *_model_rows(recipe.learner, recipe.model, recipe.lora),
        ("many processes", _parallel(recipe.parallel)),
        ("arms", ", ".join(ARMS[arm].label for arm in recipe.study.arms)),
        *_prompt_rows(recipe.prompt, recipe.images),
        *_sft_rows(recipe.sft),
        *_probe_rows(recipe.sft.handover, recipe.grpo.steps),
        *_grpo_rows(recipe.grpo, recipe.study.arms),
        *_rollout_rows(recipe.rollout, f", LoRA {adapters}" if recipe.lora.rank else "", recipe.overlap),
        *_data_rows(recipe.data, recipe.teacher, recipe.eval),
        *_validation_rows(recipe.validation, recipe.eval),
        *_kept_rows(recipe.sft, recipe.grpo),
    ]


def _model_rows(learner: Model, model: Model, lora: Lora) -> list[tuple[str, str]]:
    revision = f" at {model.revision}" if model.revision else ""
    checkpointing = ", gradient checkpointing" if model.gradient_checkpointing else ""
    checkpointing += ", fused loss" if model.fused_loss else ""
    if model.router_loss is not None:
        checkpointing += f", {model.router_loss:g} x the loss that balances experts"
    precision = f"{learner.dtype} precision"
    if learner.dtype == "bfloat16" and not lora.rank:
        precision += ", which loses small steps (model.dtype=float32 keeps them)"
    value = f"{model.name}{revision}, {precision}, {model.attention} attention{checkpointing}"
    return [("model", value), ("LoRA", _lora(lora))]


def _prompt_rows(prompt: Prompts, images: Images) -> list[tuple[str, str]]:
    rl_system = "the same" if prompt.rl_system is None else _quoted(prompt.rl_system)
    low, high, rl_low = images.min_pixels, images.max_pixels, images.rl_min_pixels
    tokens = f"{_tokens(low)} to {_tokens(high)} tokens of 28 x 28"
    return [
        ("system prompt", "the chat template's own" if prompt.system is None else _quoted(prompt.system)),
        ("system prompt in RL", rl_system),
        ("longest prompt", f"{prompt.max_tokens:,} tokens, images included; longer ones are left out"),
        ("image size", f"{low:,} to {high:,} pixels ({tokens})"),
        ("image size in RL", "the same" if rl_low is None else f"{rl_low:,} to {high:,} pixels"),
    ]


def _sft_rows(sft: Sft) -> list[tuple[str, str]]:
    return [
        ("SFT", f"{sft.epochs:g} epochs, {sft.batch_size:,} demonstrations a step"),
        ("SFT frozen", _frozen(sft.freeze)),
        ("SFT optimiser", _optimizer(sft.optimizer)),
        ("SFT loss", f"response and end tokens only; {_AVERAGES[sft.loss_average]}"),
    ]


def _probe_rows(handover: Handover, steps: int) -> list[tuple[str, str]]:
    """The row of trials of RL that choose the model of SFT; none with another rule."""
    if handover.rule != "probe":
        return []
    how = f"short RL from the model that each rule takes, {_count(handover.round_steps, 'step')} a round"
    lost = f"trials that lose take {handover.most_steps:,} of the {steps:,} steps of RL at most"
    return [("SFT hand-over", f"{how}; {lost}")]


def _grpo_rows(grpo: Grpo, arms: Collection[ArmName]) -> list[tuple[str, str]]:
    rollouts = f"{grpo.prompts_per_step:,} prompts x {grpo.group_size}"
    rollouts += f" = {grpo.prompts_per_step * grpo.group_size:,} rollouts"
    updates = _count(grpo.optimizer_steps, "optimiser step")
    return [
        ("RL", f"{grpo.steps:,} steps, each {rollouts} and {updates}"),
        ("RL frozen", _frozen(grpo.freeze)),
        ("RL optimiser", _optimizer(grpo.optimizer)),
        ("RL sampling", _sampling(grpo.temperature, grpo.top_p, grpo.max_new_tokens)),
        ("RL loss", _LOSSES[grpo.loss]),
        ("RL clip", _clip(grpo)),
        ("RL old logprobs", _old_logprobs(grpo)),
        ("RL loss averaging", _AVERAGES[grpo.loss_average]),
        ("RL advantage", _ADVANTAGES[grpo.advantage].format(grpo.pass_k)),
        ("RL KL", _kl(grpo)),
        ("RL answers at the limit", _overlong(grpo)),
        ("RL groups all alike", _zero_variance_groups(grpo)),
        *_entropy_rows(grpo.entropy),
        *_mask_rows(grpo.mismatch_mask),
        *_also_rows(grpo, arms),
        *([("RL order of problems", _ORDERS[grpo.order])] if grpo.order != "shuffled" else []),
        *_sight_rows(grpo.sight),
        *_reward_rows(grpo.reward),
    ]


def _sight_rows(sight: Sight) -> list[tuple[str, str]]:
    if not sight.coefficient:
        return []
    black = f"{sight.mask_share:.0%} of each image black"
    value = f"{sight.coefficient:g} x the policy's divergence from itself with {black} (PAPO)"
    value += f", less {sight.entropy_coefficient:g} x both entropies" if sight.entropy_coefficient else ""
    through = "both" if sight.gradient == "both" else "the one that sees"
    return [("RL reward for sight", f"{value}; gradient through {through}")]


def _clip(grpo: Grpo) -> str:
    if grpo.loss == "sapo":
        rising, falling = grpo.sapo_temperatures
        return f"none: a gate of temperature {rising:g} for good answers, {falling:g} for others"
    if grpo.loss == "dppo":
        return f"probabilities up by {grpo.clip_high:g} at most, down by {grpo.clip_low:g}"
    dual = "off" if grpo.clip_dual is None else f"{grpo.clip_dual:g}"
    return f"low {grpo.clip_low:g}, high {grpo.clip_high:g}, dual {dual}"


def _entropy_rows(entropy: Entropy) -> list[tuple[str, str]]:
    """The row of what controls entropy; none where nothing does."""
    low, high = entropy.bounds
    share, covariance = f"{entropy.held_share:g} of the tokens", "covariance of logprob and advantage"
    texts = {
        "clip_cov": f"no gradient for {share}, where the {covariance} is {low:g} to {high:g} (Clip-Cov)",
        "kl_cov": f"{entropy.coefficient:g} x |log ratio| for {share}, of the highest {covariance} (KL-Cov)",
        "bonus": f"rewarded up to {entropy.target:g} nats a token; its weight moves by "
        f"{entropy.bonus_step:g} a step, up to {entropy.bonus_max:g}",
    }
    return [("RL entropy", texts[entropy.control])] if entropy.control != "none" else []


def _mask_rows(most: float | None) -> list[tuple[str, str]]:
    """The row of answers that are left out where the policy has moved away from them; none where none are."""
    if most is None:
        return []
    text = f"answers with a negative advantage that moved by more than {most:g} nats a token are left out"
    return [("RL mismatch mask", text)]


def _also_rows(grpo: Grpo, arms: Collection[ArmName]) -> list[tuple[str, str]]:
    """The rows of the losses of each arm of RL that learns from more than the reward, and of the teacher."""
    teacher, rows = grpo.teacher, []
    for arm in RL_ARMS:
        also = grpo.of(arm).also
        if arm in arms and also.is_on:
            weights = ", ".join(
                f"{name} {_over(getattr(also, name))}"
                for name in ("reward", "sft", "distill")
                if name in also.ever
            )
            shown = (
                f"; {also.sft_batch_size:,} demonstrations an optimiser step" if "sft" in also.ever else ""
            )
            rows.append((f"RL losses, {ARMS[arm].label}", f"{weights}{shown}"))
    if teacher.model is not None:
        where = f" at {teacher.base_url}" if teacher.base_url else ", loaded beside the policy"
        rows.append(
            ("RL teacher", f"{teacher.model}{where}; a token's advantage within {teacher.bound:g} nats")
        )
    return rows


def _over(weight: float | tuple[float, float]) -> str:
    return f"{weight:g}" if isinstance(weight, float) else f"{weight[0]:g} to {weight[1]:g}"


def _rollout_rows(rollout: Rollouts, adapters: str, overlap: Overlap) -> list[tuple[str, str]]:
    """The rows of rollouts by vLLM; none for local ones, which are sampled from the trained model itself."""
    if rollout.engine == "local":
        return []
    servers = ", ".join(rollout.urls) or _count(rollout.servers, "server")
    if rollout.engine == "vllm_colocated":
        servers = "a server on every rank's GPU, asleep while it trains"
    engine = f"vLLM{' in FP8' if rollout.quantization else ''}, {servers}"
    replayed = "; its experts are replayed in training" if rollout.router_replay else ""
    correction = "not corrected" if rollout.cap is None else f"token weights up to {rollout.cap:g}"
    return [
        ("rollouts", f"{engine}{adapters}; its logprobs against the policy's: {correction}{replayed}"),
        ("RL while vLLM samples", _OVERLAPS[overlap]),
    ]


def _data_rows(data: Data, teacher: Teacher, test: Eval) -> list[tuple[str, str]]:
    rates = data.rl_pass_rate
    chosen = "" if rates is None else f", pass rate from {rates[0]:g} to {rates[1]:g}"
    chosen += ", without those that the base answers blind" if data.rl_blind == "drop" else ""
    blind = {"other": "; again with another problem's image", "removed": "; again without the image"}
    return [
        ("cold-start data", data.cold_start),
        *teacher_rows(teacher),
        ("RL data", data.rl + chosen),
        ("test set", data.test),
        (
            "test sampling",
            _sampling(test.temperature, test.top_p, test.max_new_tokens) + blind.get(test.blind, ""),
        ),
    ]


def _validation_rows(validation: Validation, test: Eval) -> list[tuple[str, str]]:
    """The row of measurements while a stage trains; none where there are none."""
    if not validation.on:
        return []
    stages = {"SFT": validation.sft_every, "RL": validation.grpo_every}
    every = " and ".join(f"every {_count(n, 'step')} of {stage}" for stage, n in stages.items() if n)
    few = f"{validation.problems:,} problems"
    source = validation.source
    where = (
        f"the last {few} of the RL data, not trained on" if source is None else f"{few} at most of {source}"
    )
    settings = validation.sampling(max_new_tokens=test.max_new_tokens, seed=0)
    several = "" if settings.n == 1 else f"{settings.n:,} answers each (pass@1 and pass@{settings.n:,}), "
    how = _sampling(settings.temperature, settings.top_p, settings.max_new_tokens)
    return [("validation", f"{every}: {where}; {several}{how}")]


def _kept_rows(sft: Sft, grpo: Grpo) -> list[tuple[str, str]]:
    """The row of models that are chosen by validation, and of checkpoints that are kept for good."""
    parts = []
    for name, stage in (("SFT", sft), ("RL", grpo)):
        parts += [f"{name} ends with the model that {_RULES[stage.rule]}"] if stage.rule in _RULES else []
        steps = ", ".join(f"{step:,}" for step in stage.keep_steps)
        parts += [f"{name} keeps the checkpoints of these steps for good: {steps}"] if steps else []
    if any(step > grpo.steps for step in grpo.keep_steps):
        parts.append(f"RL ends at step {grpo.steps:,}, before some of them")
    return [("kept", "; ".join(parts))] if parts else []


def teacher_rows(teacher: Teacher) -> list[tuple[str, str]]:
    """The rows of the teacher: its model, its sampling, and the answers that are kept."""
    if teacher.who == "builtin":
        who = f"builtin, {teacher.wrong_share:.0%} wrong"
    else:
        by_vllm = "" if teacher.rollout.engine == "local" else " by vLLM"
        where = f" at {teacher.base_url}" if teacher.who == "endpoint" else by_vllm
        who = f"{teacher.model}{where}, {_sampling(teacher.temperature, teacher.top_p, teacher.max_tokens)}"
    samples = _count(teacher.max_samples, "sample")
    enough = 0 < teacher.enough_kept < teacher.max_samples
    until = f" until {teacher.enough_kept} to keep" if enough else ""
    kept = "right ones kept" if teacher.keep == "right" else "wrong ones kept too"
    most = _count(teacher.max_kept, "demonstration")
    chain = teacher.chain.replace("_", " ")
    return [
        ("cold-start teacher", f"{who}, {samples}{until}, {kept}"),
        ("chain of thought", f"{chain}, {teacher.format}; {teacher.pick}, at most {most} a problem"),
    ]


def _lora(lora: Lora) -> str:
    if not lora.rank:
        return "off: the weights themselves train"
    scale = lora.alpha / (lora.rank**0.5 if lora.rank_stabilised else lora.rank)
    layers = ", ".join(lora.targets) or "all linear layers"
    base = "4-bit" if lora.four_bit else "frozen"
    return f"rank {lora.rank}, scale {scale:g}, on {layers} of the {_frozen(lora.parts)}, {base} weights"


def _parallel(parallel: Parallel) -> str:
    freed = "freed" if parallel.reshard_after_forward else "kept"
    formats = f"{parallel.compute_dtype} compute and {parallel.reduce_dtype} reduce precision"
    offload = ", shards and AdamW in main memory" if parallel.cpu_offload else ""
    group = f"one copy for every {parallel.shard_size} ranks, " if parallel.shard_size else ""
    return f"{group}{formats}, gathered layers {freed} after the forward pass{offload}"


def _optimizer(optimizer: Optimizer) -> str:
    first, second = optimizer.betas
    steps = optimizer.warmup_steps
    warmup = f"{_count(steps, 'step')} of warm-up" if steps else "no warm-up"
    return (
        f"AdamW, lr {optimizer.lr:g}, {optimizer.schedule}, {warmup}, "
        f"betas {first:g} and {second:g}, weight decay {optimizer.weight_decay:g}, "
        f"gradient norm at most {optimizer.max_grad_norm:g}"
    )


def _sampling(temperature: float, top_p: float, longest: int) -> str:
    method = "greedy" if temperature == 0 else f"temperature {temperature:g}, top-p {top_p:g}"
    return f"{method}, up to {longest:,} tokens"


def _old_logprobs(grpo: Grpo) -> str:
    if grpo.optimizer_steps == 1:
        return "the policy's own: with one optimiser step the ratio is 1"
    if grpo.old_logprobs == "sampler":
        return "the sampler's"
    return "recomputed by one more pass before the first optimiser step"


def _kl(grpo: Grpo) -> str:
    if grpo.kl.kind == "none" or grpo.kl.coefficient == 0:
        return "none"
    return f"{grpo.kl.coefficient:g} x {grpo.kl.kind}, in the loss, against the stage's starting point"


def _overlong(grpo: Grpo) -> str:
    parts = ["left out of the loss" if grpo.overlong.drop_truncated else "graded like any other"]
    if grpo.overlong.buffer and grpo.overlong.penalty:
        parts.append(f"up to {grpo.overlong.penalty:g} off over the last {grpo.overlong.buffer:,} tokens")
    return "; ".join(parts)


def _zero_variance_groups(grpo: Grpo) -> str:
    if not grpo.dynamic_sampling:
        return "kept: they add no gradient"
    return f"sampled anew, up to {_count(grpo.dynamic_sampling, 'more round')} a step (DAPO)"


def _reward_rows(reward: Reward) -> list[tuple[str, str]]:
    """The sum, and what each of its parts is; a reward of the rule alone is one row."""
    where = "last complete \\boxed{}"
    if reward.allow_fallbacks:
        where += ", or else <answer> tags, 'the answer is ...', a lone letter"
    texts = {
        "accuracy": f"1 if the answer in the {where} is right",
        "judge": f"{reward.judge.scale} by {reward.judge.model}, "
        + ("loaded here" if reward.judge.base_url is None else f"at {reward.judge.base_url}"),
        **{
            function_name(function): f"returned by {PurePath(function).name}" for function in reward.functions
        },
        "format": "1 if the reasoning is closed and the last box can be read",
        "length": "0.5 for the shortest answer of a group to -0.5 for the longest; wrong ones at most 0",
    }
    limit = f"{reward.deadline_s:g} s to grade, else unscored"
    if reward.weights == {"accuracy": 1.0}:
        return [("reward", f"{texts['accuracy']}; {limit}")]
    total = " + ".join(f"{weight:g} x {name}" for name, weight in reward.weights.items())
    decides = f"correct: by {next(iter(reward.weights))}"
    parts = [(f"reward: {name}", texts[name]) for name in reward.weights]
    return [("reward", f"{total}; {decides}; {limit}"), *parts]


def _frozen(parts: tuple[str, ...]) -> str:
    return ", ".join(part.replace("_", " ") for part in parts) or "nothing"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _quoted(text: str) -> str:
    return f'"{text}"' if text else "none"


def _tokens(pixels: int) -> str:
    return f"{max(1, pixels // _TOKEN_PIXELS):,}"
