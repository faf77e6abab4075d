"""The same U-ViT here and in torch, eager and compiled: a forward pass, and loss with gradients.

  python -m jointseg_jax.perf.bench_peer --backend jax --network small
  python -m jointseg_jax.perf.bench_peer --backend eager --network small
  python -m jointseg_jax.perf.bench_peer --backend compiled --network small
  python -m jointseg_jax.perf.bench_peer --backend check

1. ``forward``: one call of ``2 x rows``, as guided sampling makes it, without gradients.
2. ``gradients``: mean squared error of every stream's prediction, and its gradients, of ``rows``.
3. ``check``: both networks with the same float32 weights on the CPU; the largest difference.

Torch is no dependency: it is looked for by name when the command runs. Where it is missing, the
JSON object that this prints last says ``absent``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax.models.uvit import UViT, forward_flops, lengths
from jointseg_jax.perf import harness
from jointseg_jax.perf.harness import Action, Timing, Values, rounded

REPETITIONS = 3
CEILING = 8192  # side of the product that torch's rate is compared with


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes of a U-ViT with two patch streams, text and one time token."""

    width: int
    depth: int
    heads: int
    norm: str
    streams: Mapping[str, tuple[int, int, int]]  # name -> sides of the latent, channels, patch
    words: tuple[int, int]  # length and width of the text
    rows: int

    def module(self, dtype: str) -> UViT:
        """The network here."""
        return UViT(
            streams={
                name: {"kind": "patches", "grid": (side, side), "channels": c, "patch": p}
                for name, (side, c, p) in self.streams.items()
            },
            time_tokens=("image",),
            context={"kind": "tokens", "count": self.words[0], "width": self.words[1]},
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            norm=self.norm,
            dtype=dtype,
        )

    def inputs(self, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Latents [b, h, w, c] by stream, times [b] and text [b, l, d], random."""
        rng = np.random.default_rng(rows)
        latents = {
            name: rng.standard_normal((rows, side, side, c), np.float32)
            for name, (side, c, _) in self.streams.items()
        }
        text = rng.standard_normal((rows, *self.words), np.float32)
        return latents, rng.uniform(0, 1000, rows).astype(np.float32), text


NETWORKS = {
    "tiny": Network(
        width=32, depth=3, heads=2, norm="pre", streams={"image": (8, 4, 2), "mask": (8, 8, 4)},
        words=(4, 16), rows=2,
    ),
    # U-ViT-S with the 590 tokens of PDM
    "small": Network(
        width=512, depth=12, heads=8, norm="pre", streams={"image": (32, 4, 2), "mask": (64, 8, 4)},
        words=(77, 768), rows=32,
    ),
    # the size of JoDiffusion, 2126 tokens
    "large": Network(
        width=1536, depth=30, heads=24, norm="post",
        streams={"image": (64, 4, 2), "mask": (64, 4, 2)}, words=(77, 768), rows=8,
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------- here


def measure_jax(network: Network) -> Values:
    """Times of the network here, with the figures of ``harness.speed``."""
    module = network.module("bfloat16")

    def apply(params: Mapping, latents: Mapping, times: jax.Array, text: jax.Array) -> dict:
        labels = dict.fromkeys(latents, times)
        return module.apply({"params": params}, latents, labels, text)[0]

    def loss(params: Mapping, latents: Mapping, times: jax.Array, text: jax.Array) -> jax.Array:
        made = apply(params, latents, times, text)
        return sum(jnp.mean((made[n] - latents[n]) ** 2) for n in latents)

    init = jax.jit(lambda key: module.init(key, *_example(network))["params"])
    params = init(jax.random.key(0))
    actions = {}
    for name, call, rows in (
        ("forward", jax.jit(apply), 2 * network.rows),
        ("gradients", jax.jit(jax.value_and_grad(loss)), network.rows),
    ):
        inputs = jax.device_put(network.inputs(rows))
        run = harness.wall(lambda c=call, x=inputs: jax.block_until_ready(c(params, *x)))
        actions[name] = Action(run, rows)
    times = timed(actions)
    # Measured after the network, in the same process: the clock of a warm chip.
    flops, ceiling = forward_flops(module), harness.ceiling("bfloat16").flops
    return {
        "machine": harness.machine(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        **figures(network, times, flops, ceiling),
        "memory": harness.memory(),
    }


def _example(network: Network) -> tuple[dict, dict, np.ndarray]:
    latents, times, text = network.inputs(1)
    return latents, dict.fromkeys(latents, times), text


def timed(actions: Mapping[str, Action]) -> dict[str, Timing]:
    """Warms up and repeats each action."""
    timings = {}
    for name, action in actions.items():
        timings[name] = Timing(images=action.images)
        timings[name].warm_up(action, 2, 0)
        for _ in range(REPETITIONS):
            timings[name].repeat(action)
    return timings


def figures(network: Network, times: Mapping[str, Timing], flops: int, ceiling: float) -> Values:
    """Times, and the part of the measured ceiling that the network's products reach."""
    work = {"forward": 2 * network.rows * flops, "gradients": 3 * network.rows * flops}
    rates = {name: work[name] / timing.median for name, timing in times.items()}
    return {
        "rows": network.rows,
        "tokens": lengths(network.module("bfloat16"))[0],
        "times": {name: timing.values() for name, timing in times.items()},
        "tflops": {name: rounded(rate / 1e12) for name, rate in rates.items()},
        "ceiling_tflops": rounded(ceiling / 1e12),
        "mfu": {name: rounded(rate / ceiling) for name, rate in rates.items()},
    }


# ------------------------------------------------------------------------------- torch


def find_torch() -> ModuleType | None:
    """Torch, or None where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def torch_network(torch: ModuleType, network: Network) -> Any:
    """The network as a ``torch.nn.Module``: ``(latents, times, text) -> predictions``.

    Written after models/uvit.py; parameters are named as ``torch_weights`` names them.
    """
    nn, functional = torch.nn, torch.nn.functional
    # Plain numbers and tuples: what torch.compile sees of the sizes.
    width, heads, half, order = network.width, network.heads, network.depth // 2, network.norm
    streams, words = tuple((n, *sizes) for n, sizes in network.streams.items()), network.words
    slowest = math.log(1e4)  # of the time's frequencies

    class Block(nn.Module):
        def __init__(self, joins: bool):
            super().__init__()
            self.join = nn.Linear(2 * width, width) if joins else None
            self.join_norm = nn.LayerNorm(width) if joins and order == "post" else None
            self.attn_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def attention(self, x: Any) -> Any:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [b, h, n, d]
            y = functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(b, n, width))

        def mlp(self, x: Any) -> Any:
            return self.fc2(functional.gelu(self.fc1(x)))

        def forward(self, x: Any, skip: Any = None) -> Any:
            if self.join is not None:
                x = self.join(torch.cat([x, skip], dim=-1))
                x = self.join_norm(x) if self.join_norm is not None else x
            if order == "pre":
                x = x + self.attention(self.attn_norm(x))
                return x + self.mlp(self.mlp_norm(x))
            x = self.attn_norm(x + self.attention(x))
            return self.mlp_norm(x + self.mlp(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_position = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.text_in = nn.Linear(words[1], width)
            self.text_position = nn.Parameter(0.02 * torch.randn(1, words[0], width))
            self.enter, self.leave = nn.ModuleDict(), nn.ModuleDict()
            self.positions = nn.ParameterDict()
            for name, side, c, p in streams:
                tokens = (side // p) ** 2
                self.enter[name] = nn.Linear(p * p * c, width)
                self.leave[name] = nn.Linear(width, p * p * c)
                self.positions[name] = nn.Parameter(0.02 * torch.randn(1, tokens, width))
            self.ins = nn.ModuleList(Block(False) for _ in range(half))
            self.mid = Block(False)
            self.outs = nn.ModuleList(Block(True) for _ in range(half))
            self.norm = nn.LayerNorm(width)

        def forward(self, latents: Any, times: Any, text: Any) -> Any:
            steps = torch.arange(width // 2, device=times.device, dtype=torch.float32)
            angles = times[:, None] * torch.exp(-slowest * steps / (width // 2))
            time = torch.cat([angles.cos(), angles.sin()], dim=-1)[:, None]  # [b, 1, width]
            parts = [time + self.time_position, self.text_in(text) + self.text_position]
            for name, side, c, p in streams:
                r = side // p
                x = latents[name].reshape(-1, r, p, r, p, c).permute(0, 1, 3, 2, 4, 5)
                x = x.reshape(x.shape[0], r * r, p * p * c)  # row-major patches, channel fastest
                parts.append(self.enter[name](x) + self.positions[name])
            x, skips = torch.cat(parts, dim=1), []
            for block in self.ins:
                x = block(x)
                skips.append(x)
            x = self.mid(x)
            for block in self.outs:
                x = block(x, skips.pop())
            x, made, end = self.norm(x), {}, x.shape[1]
            for name, side, c, p in streams[::-1]:
                r = side // p
                own = x[:, end - r * r : end]
                end -= r * r
                with torch.autocast(x.device.type, enabled=False):  # heads are float32, as ours
                    y = self.leave[name](own.float())
                y = y.reshape(-1, r, r, p, p, c).permute(0, 1, 3, 2, 4, 5)
                made[name] = y.reshape(-1, side, side, c)
            return made

    return Net()


def torch_weights(params: Mapping[str, Any], network: Network) -> dict[str, np.ndarray]:
    """Our parameters under the names, and in the shapes, of ``torch_network``."""
    width, out = network.width, {}

    def linear(name: str, ours: Mapping[str, Any], inputs: int = width) -> None:
        out[f"{name}.weight"] = np.asarray(ours["kernel"]).reshape(inputs, -1).T
        if "bias" in ours:
            out[f"{name}.bias"] = np.asarray(ours["bias"]).reshape(-1)

    def norm(name: str, ours: Mapping[str, Any]) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = map(np.asarray, (ours["scale"], ours["bias"]))

    def block(name: str, ours: Mapping[str, Any]) -> None:
        linear(f"{name}.qkv", ours["attn"]["qkv"])
        linear(f"{name}.out", ours["attn"]["out"])
        linear(f"{name}.fc1", ours["mlp"]["fc1"])
        linear(f"{name}.fc2", ours["mlp"]["fc2"], 4 * width)
        for part in ("attn_norm", "mlp_norm", "join_norm"):
            if part in ours:
                norm(f"{name}.{part}", ours[part])
        if "join" in ours:
            # A x + B skip here is one Linear of the concatenation there.
            kernels = [np.asarray(ours[k]["kernel"]) for k in ("join", "join_skip")]
            linear(f"{name}.join", {**ours["join"], "kernel": np.concatenate(kernels)}, 2 * width)

    out["time_position"] = np.asarray(params["time_image"]["position"])[None]
    linear("text_in", params["context_in"]["project"], network.words[1])
    out["text_position"] = np.asarray(params["context_in"]["position"])[None]
    for name, (_, c, p) in network.streams.items():
        linear(f"enter.{name}", params[f"{name}_in"]["project"], p * p * c)
        linear(f"leave.{name}", params[f"{name}_out"]["project"])
        position = np.asarray(params[f"{name}_in"]["position"])
        out[f"positions.{name}"] = position.reshape(1, -1, width)
    for i in range(network.depth // 2):
        block(f"ins.{i}", params["in_blocks"][str(i)])
        block(f"outs.{i}", params["out_blocks"][str(i)])
    block("mid", params["mid_block"])
    norm("norm", params["norm"])
    return out


def measure_torch(torch: ModuleType, network: Network, *, compiled: bool) -> Values:
    """Times of the network in torch, bfloat16 by autocast, float32 parameters."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 for what is float32, as XLA does
    # Parameters stay float32 and are rounded in every product, as here.
    model = torch_network(torch, network).to(device)
    run = torch.compile(model) if compiled else model

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def placed(rows: int) -> tuple[Any, Any, Any]:
        latents, times, text = network.inputs(rows)
        on = {name: torch.from_numpy(x).to(device) for name, x in latents.items()}
        return on, torch.from_numpy(times).to(device), torch.from_numpy(text).to(device)

    many, few = placed(2 * network.rows), placed(network.rows)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            run(*many)
        wait()

    def gradients() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            made = run(*few)
        sum(((made[n] - few[0][n]) ** 2).mean() for n in made).backward()
        wait()

    actions = {
        "forward": Action(harness.wall(forward), 2 * network.rows),
        "gradients": Action(harness.wall(gradients), network.rows),
    }
    times = timed(actions)
    out = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        **figures(
            network, times, forward_flops(network.module("bfloat16")), _ceiling(torch, device, wait)
        ),
    }
    if device == "cuda":
        out["memory"] = {"chip_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}
    return out


def _ceiling(torch: ModuleType, device: str, wait: Callable[[], None]) -> float:
    """FLOP/s of a large bfloat16 product in torch."""
    side = CEILING if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        a @ b
        wait()

    times = timed({"product": Action(harness.wall(product))})
    return 2.0 * side**3 / min(times["product"].repetitions)


def check(torch: ModuleType) -> Values:
    """The largest difference of both networks with the same weights, in float32 on the CPU."""
    differences = {}
    for norm in ("pre", "post"):
        network = Network(**{**vars(NETWORKS["tiny"]), "norm": norm})
        module = network.module("float32")
        params = module.init(jax.random.key(0), *_example(network))["params"]
        latents, times, text = network.inputs(2)
        labels = dict.fromkeys(latents, jnp.asarray(times))
        ours, _ = module.apply({"params": params}, latents, labels, text)
        model = torch_network(torch, network)
        weights = torch_weights(params, network)
        model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()})
        with torch.no_grad():
            tensors = {n: torch.from_numpy(x) for n, x in latents.items()}
            theirs = model(tensors, torch.from_numpy(times), torch.from_numpy(text))
        differences[norm] = max(
            float(np.abs(np.asarray(ours[n]) - theirs[n].numpy()).max()) for n in ours
        )
    return {"largest_difference": differences, "summary": {"ok": max(differences.values()) < 1e-4}}


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=("jax", "eager", "compiled", "check"), required=True)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="small")
    flags = parser.parse_args()
    network, names = NETWORKS[flags.network], {"backend": flags.backend, "network": flags.network}
    if flags.backend == "check":
        jax.config.update("jax_platforms", "cpu")  # a GPU is left to torch
    torch = None if flags.backend == "jax" else find_torch()
    if flags.backend == "jax":
        out = measure_jax(network)
    elif torch is None:
        out = {"absent": "torch is not installed here"}
    elif flags.backend == "check":
        out = check(torch)
    else:
        out = measure_torch(torch, network, compiled=flags.backend == "compiled")
    print(json.dumps(names | out))


if __name__ == "__main__":
    main()
