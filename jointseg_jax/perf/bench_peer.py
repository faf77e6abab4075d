"""The same U-ViT here and in torch, eager and compiled: a forward pass, and loss with gradients.

  python -m jointseg_jax.perf.bench_peer --backend jax --network small      (or eager, compiled)
  python -m jointseg_jax.perf.bench_peer --backend check

1. ``forward``: one call of ``2 x rows``, as guided sampling makes it, without gradients.
2. ``gradients``: mean squared error of every stream's prediction, and its gradients, of ``rows``.
3. ``check``: both networks with the same float32 weights on the CPU; the largest difference.

Torch is no dependency: it is looked for by name when the command runs. Where it is missing, the
JSON object that this prints last says ``absent``.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jointseg_jax.models.embed import Patches, Tokens
from jointseg_jax.models.uvit import UViT, forward_flops, lengths
from jointseg_jax.perf import harness
from jointseg_jax.perf.harness import Action, Values, rounded
from jointseg_jax.rules import by_path
from jointseg_jax.types import Array, Params, Streams

CEILING = {"cuda": 8192, "cpu": 512}
"""Device -> side of the product that torch's rate is compared with."""

Tensor = Any
"""A torch tensor: torch is looked for only when the command runs."""


def _uvit(
    streams: Mapping[str, tuple[int, int, int]], words: tuple[int, int], **fields: Any
) -> UViT:
    """A U-ViT with text, one time token and streams of (sides of the latent, channels, patch)."""
    return UViT(
        streams={n: Patches(grid=(s, s), channels=c, patch=p) for n, (s, c, p) in streams.items()},
        time_tokens=("image",),
        context=Tokens(count=words[0], width=words[1]),
        dtype="bfloat16",
        **fields,
    )


TINY = _uvit({"image": (8, 4, 2), "mask": (8, 8, 4)}, (4, 16), width=32, depth=3, heads=2)
PDM = _uvit({"image": (32, 4, 2), "mask": (64, 8, 4)}, (77, 768), width=512, depth=12, heads=8)
JODIFFUSION = _uvit(
    dict.fromkeys(("image", "mask"), (64, 4, 2)), (77, 768), width=1536, depth=30, heads=24,
    norm="post",
)  # fmt: skip

# U-ViT-S with the 590 tokens of PDM; the size of JoDiffusion, 2126 tokens
NETWORKS = {"tiny": (TINY, 2), "small": (PDM, 32), "large": (JODIFFUSION, 8)}
"""Name -> network, rows."""


def inputs(network: UViT, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Latents [b, h, w, c] by stream, times [b] and text [b, l, d], random."""
    rng = np.random.default_rng(rows)
    shapes = {n: (rows, *spec.shape) for n, spec in network.specs.items()}
    latents = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
    text = rng.standard_normal((rows, *network.context.shape), np.float32)
    return latents, rng.uniform(0, 1000, rows).astype(np.float32), text


def initial(network: UViT, key: Array) -> Params:
    """Fresh parameters of the network."""
    return network.lazy_init(key, **network.input_shapes())["params"]


def measured(
    network: UViT,
    rows: int,
    forward: Callable[[], object],
    gradients: Callable[[], object],
    ceiling: Callable[[], float],
) -> Values:
    """Times of both calls, and the part of the ceiling (FLOP/s) that their products reach."""
    calls = {"forward": (forward, 2 * rows), "gradients": (gradients, rows)}
    times = {k: harness.timed(Action(harness.wall(c), n), warmups=2) for k, (c, n) in calls.items()}
    # Measured after the network, in the same process: the clock of a warm chip.
    top, flops = ceiling(), forward_flops(network)
    # A backward pass has two products for each of the forward pass.
    work = {"forward": 2 * rows * flops, "gradients": 3 * rows * flops}
    rates = {name: work[name] / timing.median for name, timing in times.items()}
    return {
        "rows": rows,
        "tokens": lengths(network)[0],
        "times": {name: timing.values() for name, timing in times.items()},
        "tflops": {name: rounded(rate / 1e12) for name, rate in rates.items()},
        "ceiling_tflops": rounded(top / 1e12),
        "mfu": {name: rounded(rate / top) for name, rate in rates.items()},
    }


# --------------------------------------------------------------------------------- here


def measure_jax(network: UViT, rows: int) -> Values:
    """Times of the network here, bfloat16 with float32 parameters."""

    def apply(params: Params, latents: Streams, times: Array, text: Array) -> dict[str, Array]:
        return network.apply({"params": params}, latents, dict.fromkeys(latents, times), text)[0]

    def loss(params: Params, latents: Streams, times: Array, text: Array) -> Array:
        made = apply(params, latents, times, text)
        return sum(jnp.mean((made[n] - latents[n]) ** 2) for n in latents)

    params = jax.jit(lambda key: initial(network, key))(jax.random.key(0))
    many, few = (jax.device_put(inputs(network, n * rows)) for n in (2, 1))
    forward, gradients = jax.jit(apply), jax.jit(jax.value_and_grad(loss))
    return {
        "machine": harness.machine(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **measured(
            network,
            rows,
            lambda: jax.block_until_ready(forward(params, *many)),
            lambda: jax.block_until_ready(gradients(params, *few)),
            lambda: harness.ceiling("bfloat16").flops,
        ),
        "memory": harness.memory(),
    }


# ------------------------------------------------------------------------------- torch


class TorchNetwork:
    """``(latents, times, text) -> predictions`` in torch, written after models/uvit.py.

    Attributes:
      weights: our parameters by path, as ``torch_weights`` returns them.
    """

    def __init__(self, torch: ModuleType, network: UViT, weights: dict[str, Tensor]):
        self.torch, self.weights = torch, weights
        # Plain numbers and tuples: what torch.compile sees of the sizes.
        self.width, self.heads, self.half = network.width, network.heads, network.depth // 2
        self.post = network.norm == "post"
        self.streams = tuple((n, s.grid[0], s.channels, s.patch) for n, s in network.streams)

    def linear(self, name: str, x: Tensor) -> Tensor:
        w = self.weights
        return self.torch.nn.functional.linear(x, w[f"{name}/kernel"], w.get(f"{name}/bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale, bias = self.weights[f"{name}/scale"], self.weights[f"{name}/bias"]
        return self.torch.nn.functional.layer_norm(x, (self.width,), scale, bias)

    def attention(self, name: str, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.linear(f"{name}/attn/qkv", x).reshape(b, n, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [b, h, n, d] each
        y = self.torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.linear(f"{name}/attn/out", y.transpose(1, 2).reshape(b, n, self.width))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.torch.nn.functional.gelu(self.linear(f"{name}/mlp/fc1", x))
        return self.linear(f"{name}/mlp/fc2", hidden)

    def block(self, name: str, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.linear(f"{name}/join", self.torch.cat([x, skip], dim=-1))
            x = self.norm(f"{name}/join_norm", x) if self.post else x
        if self.post:
            x = self.norm(f"{name}/attn_norm", x + self.attention(name, x))
            return self.norm(f"{name}/mlp_norm", x + self.mlp(name, x))
        x = x + self.attention(name, self.norm(f"{name}/attn_norm", x))
        return x + self.mlp(name, self.norm(f"{name}/mlp_norm", x))

    def embed(self, latents: Mapping[str, Tensor], times: Tensor, text: Tensor) -> Tensor:
        """All tokens with their positions, ``[b, n, width]``."""
        torch, position = self.torch, lambda name: self.weights[f"{name}/position"]
        steps = torch.arange(self.width // 2, device=times.device, dtype=torch.float32)
        angles = times[:, None] * torch.exp(-math.log(1e4) * steps / (self.width // 2))
        time = torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]  # [b, 1, width]
        parts = [time + position("time_image")]
        parts.append(self.linear("context_in/project", text) + position("context_in"))
        for name, side, c, p in self.streams:
            r = side // p
            x = latents[name].reshape(-1, r, p, r, p, c).permute(0, 1, 3, 2, 4, 5)
            x = x.reshape(-1, r * r, p * p * c)  # row-major patches, channel fastest
            parts.append(self.linear(f"{name}_in/project", x) + position(f"{name}_in"))
        return torch.cat(parts, dim=1)

    def __call__(self, latents: Mapping[str, Tensor], times: Tensor, text: Tensor) -> Tensor:
        x, skips = self.embed(latents, times, text), []
        for i in range(self.half):
            x = self.block(f"in_blocks/{i}", x)
            skips.append(x)
        x = self.block("mid_block", x)
        for i in range(self.half):
            x = self.block(f"out_blocks/{i}", x, skips.pop())
        x, made, end = self.norm("norm", x), {}, x.shape[1]
        for name, side, c, p in self.streams[::-1]:
            r = side // p
            own, end = x[:, end - r * r : end], end - r * r
            with self.torch.autocast(x.device.type, enabled=False):  # heads are float32, as ours
                y = self.linear(f"{name}_out/project", own.float())
            y = y.reshape(-1, r, r, p, p, c).permute(0, 1, 3, 2, 4, 5)
            made[name] = y.reshape(-1, side, side, c)
        return made


def torch_weights(params: Params) -> dict[str, np.ndarray]:
    """Our parameters by path in torch's shapes: kernels ``[out, in]``, positions ``[n, d]``."""
    out = {}
    for path, value in by_path(params).items():
        x = np.asarray(value)
        if path.endswith("/qkv/kernel"):
            x = rearrange(x, "i k h d -> (k h d) i")
        elif path.endswith("/kernel"):
            x = rearrange(x, "... o -> o (...)")  # [h, d, o] after attention, [i, o] elsewhere
        elif path.endswith("/position"):
            x = rearrange(x, "... d -> (...) d")
        out[path] = x
    for path in [path for path in out if "/join_skip/" in path]:
        # A x + B skip here is one product of the concatenation there.
        both = path.replace("join_skip", "join")
        out[both] = np.concatenate([out[both], out.pop(path)], axis=1)
    return out


def measure_torch(torch: ModuleType, network: UViT, rows: int, *, compiled: bool) -> Values:
    """Times of the network in torch, bfloat16 by autocast, float32 parameters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.set_float32_matmul_precision("high")  # TF32 for what is float32, as XLA does
    # Parameters stay float32 and are rounded in every product, as here.
    weights = {k: x.to(device).requires_grad_() for k, x in _random(torch, network).items()}
    run = TorchNetwork(torch, network, weights)
    run = torch.compile(run) if compiled else run
    many, few = (
        jax.tree.map(lambda x: torch.from_numpy(x).to(device), inputs(network, n * rows))
        for n in (2, 1)
    )

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            run(*many)
        wait()

    def gradients() -> None:
        for x in weights.values():
            x.grad = None
        with torch.autocast(device, torch.bfloat16):
            made = run(*few)
        sum(((made[n] - few[0][n]) ** 2).mean() for n in made).backward()
        wait()

    def ceiling() -> float:
        side = CEILING[device]
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = harness.timed(Action(harness.wall(lambda: (a @ b, wait()))), warmups=2)
        return 2.0 * side**3 / min(product.repetitions)

    out = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(x.numel() for x in weights.values()),
        **measured(network, rows, forward, gradients, ceiling),
    }
    if device == "cuda":
        out["memory"] = {"chip_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}
    return out


def _random(torch: ModuleType, network: UViT) -> dict[str, Tensor]:
    shapes = jax.eval_shape(lambda: initial(network, jax.random.key(0)))
    zeros = torch_weights(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes))
    # Norms start near one, as everywhere.
    return {k: 0.02 * torch.randn(x.shape) + k.endswith("/scale") for k, x in zeros.items()}


def check(torch: ModuleType) -> Values:
    """The largest difference of both networks with the same weights, in float32 on the CPU."""
    differences = {}
    for norm in ("pre", "post"):
        network = TINY.clone(norm=norm, dtype="float32")
        params = initial(network, jax.random.key(0))
        given = inputs(network, 2)
        latents, times, text = jax.device_put(given)
        ours, _ = network.apply({"params": params}, latents, dict.fromkeys(latents, times), text)
        weights = {k: torch.from_numpy(x.copy()) for k, x in torch_weights(params).items()}
        with torch.no_grad():
            theirs = TorchNetwork(torch, network, weights)(*jax.tree.map(torch.from_numpy, given))
        differences[norm] = max(
            float(np.abs(np.asarray(ours[n]) - theirs[n].numpy()).max()) for n in ours
        )
    return {"largest_difference": differences, "summary": {"ok": max(differences.values()) < 1e-4}}


def main() -> None:
    """Measures what the command line names."""
    parser = harness.parser(__doc__)
    parser.add_argument("--backend", choices=("jax", "eager", "compiled", "check"), required=True)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="small")
    flags = parser.parse_args()
    (network, rows), out = NETWORKS[flags.network], vars(flags)
    if flags.backend == "jax":
        print(json.dumps(out | measure_jax(network, rows)))
        return
    jax.config.update("jax_platforms", "cpu")  # a GPU is left to torch
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        out["absent"] = "torch is not installed here"
    else:
        compiled = flags.backend == "compiled"
        own = flags.backend == "check"
        out |= check(torch) if own else measure_torch(torch, network, rows, compiled=compiled)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
