"""The layers of a language model as its modules have them: their mixers, and the weights that compute."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Softmax attention.

    `queries` are the numbers of a token's queries in all heads, `keys` those of its keys (there are as many
    values), which a layer that is not `own` takes from an earlier one. A `window` of 0 is none.
    `doubled`: the projection of queries makes a gate too. `norms` counts those of queries, keys and values.
    """

    heads: int
    queries: int
    keys: int
    window: int
    own: bool
    doubled: bool
    norms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNet:
    """A gated delta net: numbers of a token's keys (and queries) before they are repeated, and of values."""

    heads: int
    keys: int
    values: int
    key_size: int
    kernel: int

    @property
    def state(self) -> int:
        """The numbers of a recurrent state."""
        return self.values * self.key_size


Mixer = Attention | DeltaNet


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of a language model.

    `weights` compute every token; of the `experts`' weights a token needs the share `chosen` / `routed`, the
    number of experts that are chosen for it of those that there are. `dense` is the width of the MLP (or of
    the shared expert), `expert` that of one expert. `norms` have the hidden width, and `fed` tensors of that
    width are inputs of linear layers; `side` is the width of per-layer inputs. `exact` norms multiply by
    their weights in fp32; `router_norm`: the router has one of its own.
    """

    mixer: Mixer
    weights: int
    experts: int
    routed: int
    chosen: int
    dense: int
    expert: int
    norms: int
    fed: int
    side: int
    exact: bool
    router_norm: bool

    @property
    def active(self) -> float:
        """The weights that compute one token."""
        return self.weights + (self.experts * self.chosen / self.routed if self.routed else 0)

    @property
    def intermediate(self) -> int:
        """The intermediate numbers of a token: of the MLP and of all its experts."""
        return self.dense + self.chosen * self.expert
