"""Warning signs of RL: metrics with limits above which a reward is being exploited or training is failing.

The training screen, the report and `rlcs doctor` read it.
"""

from dataclasses import dataclass

from rlcs.recipe.sampling import Rollouts


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """A metric of GRPO that should stay below `most`; `form` writes its values, `fix` says what to change."""

    key: str
    name: str
    form: str
    most: float
    fix: str

    def message(self, value: float, most: float | None = None) -> str:
        """The warning for a value above the limit (or above `most`, where a recipe sets another limit)."""
        limit = self.most if most is None else most
        return f"{self.form.format(value)}, more than {self.form.format(limit)}"


LAST_STEPS = 10
"""Steps at the end of a stage whose mean is compared with the limits."""
READ_ROLLOUTS = "read some: rlcs report RUN --live"
HOLD_POLICY = "grpo.kl.kind=k3 grpo.kl.coefficient=0.01"
"""Parts of several fixes: look at rollouts; keep the policy near its start."""

SIGNS = (
    Sign(
        key="boxes_per_answer", name="Boxes per answer", form="{:.2f}", most=1.5,
        fix=f"guesses are spread over boxes: {READ_ROLLOUTS}; more cold-start data, or {HOLD_POLICY}",
    ),
    Sign(
        key="repeated_share", name="Answers that repeat themselves", form="{:.1%}", most=0.1,
        fix=f"halve grpo.optimizer.lr, or {HOLD_POLICY}",
    ),
    Sign(
        key="no_format_share", name="Answers without a box to read", form="{:.1%}", most=0.2,
        fix=f"{READ_ROLLOUTS}; more cold-start data, or longer answers (grpo.max_new_tokens)",
    ),
    Sign(
        key="truncated", name="Answers cut at the limit", form="{:.1%}", most=0.1,
        fix="raise grpo.max_new_tokens, or set grpo.overlong.buffer",
    ),
    Sign(
        key="unscored", name="Answers that could not be graded", form="{:.1%}", most=0.05,
        fix="see why in rollouts/: correct what fails; where it timed out, raise grpo.reward.deadline_s",
    ),
    Sign(
        key="zero_variance_groups", name="Groups with equal rewards", form="{:.1%}", most=0.8,
        fix="grpo.order=signal, grpo.dynamic_sampling=2, or medium problems (data.rl_pass_rate)",
    ),
    Sign(
        key="kl", name="KL from the reference", form="{:.2g} nats a token", most=1.0,
        fix="halve grpo.optimizer.lr, or raise grpo.kl.coefficient",
    ),
    Sign(
        key="sampler_gap", name="Gap between sampler and policy", form="{:.2g} nats a token",
        most=Rollouts().alarm, fix="run rlcs doctor; set model.attention=dense",
    ),
)  # fmt: skip

FALLS = (
    ("accuracy", "Share of right answers", "{:.1%}", 0.4, 0.2),
    ("response_tokens", "Tokens of an answer", "{:.0f}", 0.3, 1.0),
    ("entropy", "Entropy", "{:.2g} nats a token", 0.1, 0.05),
)
"""Metrics that should not fall below a share of their best: key, name, form, that share, and how high the
best must be to say something."""
