"""Training times: which t each stream of each row is shown.

1. A *distribution* gives one number in [0, 1] per row:

   | name | t, from u uniform in [0, 1) and n normal | density |
   |---|---|---|
   | uniform, steps = 0 | low + (high - low) u | flat |
   | uniform, steps = N | low + (high - low) (floor(N u) + 1) / N | flat on the N knots |
   | logit_normal | 1 / (1 + exp(-(mean + std n))) | logit t normal |
   | high_noise | u^(1 / (1 + power)) | (1 + power) t^power |
   | ends | 0, 1, or flat between | clean and noise at the ends, the rest flat |

2. A *coupling* says which streams share the draw: all (``Shared``), none (``Independent``), or
   those of a group (``Grouped``).

Every draw depends on its row's key, and on its stream's (or group's) name, alone.

Source: 1 logit-normal, Stable Diffusion 3 (Esser et al. 2024) sec. 3.1; 2 independent times,
UniDiffuser (Bao et al. 2023) sec. 3; one shared time, PDM alg. 1 and JoDiffusion sec. 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jointseg_jax.rng import Keys, fold, name_id, uniform
from jointseg_jax.types import require_values

Time = Float[Array, " batch"]
PLACE = "`times.distribution`"


@runtime_checkable
class Distribution(Protocol):
    """Draws one time per row."""

    def __call__(self, keys: Keys) -> Time: ...


@runtime_checkable
class TimeSampler(Protocol):
    """Draws the training times of all streams: a distribution with a coupling."""

    def draw(self, keys: Keys, streams: Sequence[str]) -> dict[str, Time]:
        """One time per row for every stream, in [0, 1]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Flat between ``low`` and ``high``; with ``steps``, on as many equal knots (0: continuous)."""

    low: float = 0.0
    high: float = 1.0
    steps: int = 0

    def __post_init__(self) -> None:
        good = 0 <= self.low < self.high <= 1 and self.steps >= 0
        rule = f"0 <= low < high <= 1 and steps >= 0 must hold; change them in {PLACE}."
        given = dataclasses.asdict(self)
        require_values("uniform times", good, rule, **given)

    def __call__(self, keys: Keys) -> Time:
        """Draws one time per row."""
        u = uniform(keys)
        # t = 0 is clean and has nothing to learn: knots are 1/N .. 1
        u = (jnp.floor(u * self.steps) + 1) / self.steps if self.steps else u
        return self.low + (self.high - self.low) * u


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """Most weight in the middle; a positive ``mean`` moves it towards the source end."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        rule = f"must be positive; change it in {PLACE}."
        require_values("logit_normal times", self.std > 0, rule, std=self.std)

    def __call__(self, keys: Keys) -> Time:
        """Draws one time per row."""
        # t = 1 / (1 + exp(-(mean + std n)))
        n = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(keys)
        return jax.nn.sigmoid(self.mean + self.std * n)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HighNoise:
    """Density (1 + power) t^power: more weight on the source end the larger the power."""

    power: float = 1.0

    def __post_init__(self) -> None:
        rule = f"must be at least 0 (0 is uniform); change it in {PLACE}."
        require_values("high_noise times", self.power >= 0, rule, power=self.power)

    def __call__(self, keys: Keys) -> Time:
        """Draws one time per row."""
        # the inverse of the distribution function t^(1 + power)
        return uniform(keys) ** (1 / (1 + self.power))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends:
    """Often at the ends: for a stream that sampling gives clean (a prompt) or not at all."""

    clean: float = 0.5  # probability of t = 0
    noise: float = 0.1  # probability of t = 1

    def __post_init__(self) -> None:
        good = self.clean >= 0 and self.noise >= 0 and self.clean + self.noise <= 1
        rule = f"must be at least 0 and at most 1 together; change them in {PLACE}."
        require_values("ends times", good, rule, clean=self.clean, noise=self.noise)

    def __call__(self, keys: Keys) -> Time:
        """Draws one time per row."""
        u, between = uniform(keys), 1 - self.clean - self.noise
        # u below clean: 0; the last `noise` of it: 1; a straight line between them
        t = (u - self.clean) / (between or 1.0)
        return jnp.where(u < self.clean, 0.0, jnp.where(u >= 1 - self.noise, 1.0, t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """One time for all streams of a row."""

    distribution: Distribution = Uniform()

    def draw(self, keys: Keys, streams: Sequence[str]) -> dict[str, Time]:
        """One draw for each row, the same under every name."""
        return dict.fromkeys(streams, self.distribution(fold(keys, name_id("shared"))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Independent:
    """A time of its own for every stream, so that every conditional is trained too."""

    distribution: Distribution = Uniform()

    def draw(self, keys: Keys, streams: Sequence[str]) -> dict[str, Time]:
        """One draw per name."""
        return {name: self.distribution(fold(keys, name_id(name))) for name in streams}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """One time per group of streams, for example ``(("image", "mask"), ("text",))``."""

    groups: tuple[tuple[str, ...], ...]
    distribution: Distribution = Uniform()
    distributions: Mapping[str, Distribution] | tuple[tuple[str, Distribution], ...] = ()
    """Of the groups that have another one, by the name of a group's first stream."""

    def __post_init__(self) -> None:
        if isinstance(self.distributions, Mapping):  # pairs can be hashed
            object.__setattr__(self, "distributions", tuple(self.distributions.items()))
        # JSON configs hold lists, and groups are dict keys below
        object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))
        names = [name for group in self.groups for name in group]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        twice = f", twice: {', '.join(duplicates)}" if duplicates else ""
        rule = f"every stream must be in exactly one group{twice}; change `times.groups`."
        good = bool(names) and not duplicates
        require_values("grouped times", good, rule, groups=self.groups)
        firsts = [group[0] for group in self.groups]
        rule = f"the first streams of groups are {firsts}; change `times.distributions`."
        own = dict(self.distributions)
        require_values("grouped times", set(own) <= set(firsts), rule, distributions=list(own))

    def draw(self, keys: Keys, streams: Sequence[str]) -> dict[str, Time]:
        """One draw per group."""
        group_of = {name: group for group in self.groups for name in group}
        missing = [name for name in streams if name not in group_of]
        if missing:
            raise ValueError(
                f"grouped times: streams {', '.join(missing)} are in none of the groups "
                f"{self.groups}; add them to `times.groups`."
            )
        groups = dict.fromkeys(group_of[name] for name in streams)
        own = dict(self.distributions)
        drawn = {}
        for g in groups:
            drawn[g] = own.get(g[0], self.distribution)(fold(keys, name_id("+".join(g))))
        return {name: drawn[group_of[name]] for name in streams}
