"""A Gaussian whose flow is known: what an exact network would say, and where the flow leads.

Data ``N(mean, std^2)`` and noise of deviation kappa give states ``N(alpha mean, v)`` with
``v = alpha^2 std^2 + kappa^2 sigma^2``. The posterior mean of the data is
``mean + alpha std^2 / v (x - alpha mean)``, and the flow keeps ``(x - alpha mean) / sqrt(v)``.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.transport.process import Process


@dataclasses.dataclass(frozen=True)
class Gaussian:
    process: Process
    mean: float = 0.3
    std: float = 0.5

    def spread(self, t):
        schedule, kappa = self.process.schedule, self.process.scale
        return np.hypot(schedule.alpha(t) * self.std, kappa * schedule.sigma(t))

    def predict(self, x, t, step):
        """The exact network for stream ``x``, in the process's own prediction."""
        x, t = x["x"], t["x"]
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        variance = (alpha * self.std) ** 2 + (self.process.scale * sigma) ** 2
        data = self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)
        source = self.process.scale**2 * sigma / variance * (x - alpha * self.mean)
        return {"x": self.process.target(data, source, t)}

    def flow(self, x, start, end):
        """Where the exact flow brings x."""
        alpha = self.process.schedule.alpha
        share = self.spread(end) / self.spread(start)
        return alpha(end) * self.mean + (x - alpha(start) * self.mean) * share

    def error(self, solver):
        """The largest error of a solver over two states a unit apart."""
        start = self.process.schedule.t_max if solver.start is None else solver.start
        x = jnp.array([[0.0], [1.0]])
        got = solver(self.predict, {"x": self.process}, {"x": x})["x"]
        return float(np.abs(got - self.flow(np.asarray(x), start, solver.end)).max())


@pytest.fixture
def gaussian():
    """``gaussian(process, mean=0.3, std=0.5)``."""
    return Gaussian
