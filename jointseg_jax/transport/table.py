"""The names under which configs choose times, distributions of times, and solvers."""

from jointseg_jax.transport.adaptive import Dopri5
from jointseg_jax.transport.discrete import DDIM, DDPM, MultistepDPM
from jointseg_jax.transport.dpm import DPMSolverPP
from jointseg_jax.transport.solvers import Euler, Heun
from jointseg_jax.transport.times import (
    Grouped,
    HighNoise,
    Independent,
    LogitNormal,
    Shared,
    Uniform,
)

DISTRIBUTIONS = {"uniform": Uniform, "logit_normal": LogitNormal, "high_noise": HighNoise}

TIMES = {"shared": Shared, "independent": Independent, "grouped": Grouped}

SOLVERS = {
    "dpm_solver_pp": DPMSolverPP,
    "multistep_dpm": MultistepDPM,
    "ddim": DDIM,
    "ddpm": DDPM,
    "euler": Euler,
    "heun": Heun,
    "dopri5": Dopri5,
}
