"""Images and pixel-level annotations, generated together, in JAX.

What a notebook needs, from one place; each name is imported when it is first used:

  from jointseg_jax import Joint, Stream, load_run, sample

``launch/tour.ipynb`` uses nothing else, ``jointseg_jax/README.md`` says what is where.
"""

from etils import epy as _epy

__version__ = "0.1.0"

with _epy.lazy_api_imports(globals()):
    # A trained run: read it, make pairs, measure it.
    from jointseg_jax.evaluation.evaluate import evaluate
    from jointseg_jax.generation.filters import Filters
    from jointseg_jax.generation.in_memory import InMemory, sample_pairs, segment
    from jointseg_jax.generation.sample import SampleOptions, sample
    from jointseg_jax.training.workdir import load_run

    # A system of your own: streams denoised together, or two ends of one flow.
    from jointseg_jax.systems.bridge import Bridge
    from jointseg_jax.systems.joint import Joint
    from jointseg_jax.systems.system import Stream

    # Networks.
    from jointseg_jax.models.text import Words
    from jointseg_jax.models.two_stream import TwoStream
    from jointseg_jax.models.uvit import UViT

    # How a stream moves, when it is trained, how it is sampled.
    from jointseg_jax.transport.ancestral import Ancestral
    from jointseg_jax.transport.dpm import DPMSolverPP
    from jointseg_jax.transport.loss_weight import InverseSigma, MinSNR
    from jointseg_jax.transport.process import Process
    from jointseg_jax.transport.schedules import Cosine, Linear, ScaledLinear
    from jointseg_jax.transport.solvers import Euler, Heun
    from jointseg_jax.transport.times import Grouped, Independent, LogitNormal, Shared, Uniform

    # Codecs: pixels or labels <-> latents.
    from jointseg_jax.codecs.bits import Bits, PanopticBits
    from jointseg_jax.codecs.chain import Chain
    from jointseg_jax.codecs.image_tiny import ImageTiny
    from jointseg_jax.codecs.label_ae import LabelAE
    from jointseg_jax.codecs.palette import Palette
    from jointseg_jax.codecs.pixels import Latents, Pixels

    # Data, label maps and pictures of both.
    from jointseg_jax.annotations.masks import absorb
    from jointseg_jax.annotations.viz import overlay, pair_sheet
    from jointseg_jax.data.classes import Classes
    from jointseg_jax.data.sources.folders import Folders
    from jointseg_jax.data.sources.scenes import Scenes

    # Randomness: one key per training row, one per sample.
    from jointseg_jax.rng import row_keys, sample_keys

    # Annotations without a class.
    from jointseg_jax.types import VOID

__all__ = [
    "VOID",
    "Ancestral",
    "Bits",
    "Bridge",
    "Chain",
    "Classes",
    "Cosine",
    "DPMSolverPP",
    "Euler",
    "Filters",
    "Folders",
    "Grouped",
    "Heun",
    "ImageTiny",
    "InMemory",
    "Independent",
    "InverseSigma",
    "Joint",
    "LabelAE",
    "Latents",
    "Linear",
    "LogitNormal",
    "MinSNR",
    "Palette",
    "PanopticBits",
    "Pixels",
    "Process",
    "SampleOptions",
    "ScaledLinear",
    "Scenes",
    "Shared",
    "Stream",
    "TwoStream",
    "UViT",
    "Uniform",
    "Words",
    "absorb",
    "evaluate",
    "load_run",
    "overlay",
    "pair_sheet",
    "row_keys",
    "sample",
    "sample_keys",
    "sample_pairs",
    "segment",
]
