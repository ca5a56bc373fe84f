"""The recipe's section `trackers`: where metrics go besides `metrics.jsonl`."""

from rlcs.recipe.section import Section


class Trackers(Section):
    """Metrics for other people's dashboards; none changes the run, or hurts it when it fails."""

    tensorboard: bool = False
    """Event files in RUN/STAGE/tensorboard (`pip install tensorboard`)."""
    trackio: str | None = None
    """A project of trackio, kept on this machine (`pip install trackio`)."""
    wandb: str | None = None
    """A project of Weights & Biases (`pip install wandb`); `WANDB_MODE=offline` works."""
