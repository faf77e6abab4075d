"""How close an attention backend comes to exact attention, beside plain products of its dtype.

  python -m jointseg_jax.perf.bench_attention                          cudnn, on an NVIDIA GPU
  python -m jointseg_jax.perf.bench_attention --backends packed --tokens 130 --heads 8 --size 16

1. ``exact`` is attention by plain products in float32 at the highest precision, of inputs that were
   rounded to ``--dtype`` first; errors are ``|y - exact| / |exact|`` (2-norms), of the result and
   of the gradients of q, k and v.
2. A backend is ``ok`` if no error is more than ``SLACK`` times that of plain products of the same
   dtype (``xla``), or more than ``FLOOR``.

Tokens are padded as networks pad them for the backend. Prints one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax.models import attention
from jointseg_jax.models.packed_attention import attend_packed
from jointseg_jax.perf import harness
from jointseg_jax.perf.harness import Action, Values, rounded
from jointseg_jax.types import Array

SLACK, FLOOR = 2.0, 1e-3
NAMES = ("y", "dq", "dk", "dv")

Attend = Callable[[Array, Array, Array], Array]
"""q, k, v ``[b, n, heads, size]`` -> y of the same shape."""


def _packed(q: Array, k: Array, v: Array) -> Array:
    b, n, heads, size = q.shape
    # The kernel takes scaled queries and the heads of a token side by side.
    flat = (x.reshape(b, n, heads * size) for x in (q * size**-0.5, k, v))  # [b, n, heads * size]
    return attend_packed(*flat, heads=heads).reshape(q.shape)


BACKENDS = {"xla": attention.attend_xla, "cudnn": attention.attend_cudnn, "packed": _packed}


def with_gradients(attend: Attend) -> Callable[..., tuple[Array, ...]]:
    """The jitted ``(q, k, v, dy) -> (y, dq, dk, dv)`` of a backend."""

    def both(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, ...]:
        y, pull_back = jax.vjp(attend, q, k, v)
        return (y, *pull_back(dy))

    return jax.jit(both)


def errors(found: tuple[Array, ...], exact: tuple[Array, ...]) -> dict[str, float]:
    """Relative errors of the result and the gradients, by name."""
    pairs = ([np.asarray(x, np.float64) for x in pair] for pair in zip(found, exact, strict=True))
    norm = np.linalg.norm
    return {name: rounded(float(norm(x - y) / norm(y))) for name, (x, y) in zip(NAMES, pairs)}


def measure(backend: str, tokens: int, rows: int, heads: int, size: int, dtype: str) -> Values:
    """Errors and times of a backend and of plain products, for one number of tokens."""
    fields = {"dtype": dtype, "heads": heads, "size": size}
    count = tokens + attention.padding(backend, tokens, **fields)
    # Of order 1, as after the norms of a network; scores then have a spread of one.
    rng = np.random.default_rng(tokens)
    shape = (rows, count, heads, size)
    inputs = [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(4)]
    # Else a GPU multiplies float32 in TF32, with errors like those that are measured.
    with jax.default_matmul_precision("highest"):
        exact = with_gradients(attention.attend_xla)(*(x.astype(jnp.float32) for x in inputs))
    out: Values = {"tokens": tokens, "padded_to": count, "errors": {}, "ms": {}}
    # Plain products first: their error is what rounding alone costs.
    for name in dict.fromkeys(("xla", backend)):
        both, forward = with_gradients(BACKENDS[name]), jax.jit(BACKENDS[name])
        try:
            out["errors"][name] = errors(both(*inputs), exact)
        except Exception as error:  # a backend that refuses a size is a result, not the end
            out["error"] = f"{name}: {error}"[:2000]
            return out | {"ok": False}
        times = {"forward": (forward, inputs[:3]), "with gradients": (both, inputs)}
        out["ms"][name] = {k: _milliseconds(call, values) for k, (call, values) in times.items()}
    own, plain = out["errors"][backend], out["errors"]["xla"]
    out["ok"] = all(own[k] <= max(SLACK * plain[k], FLOOR) for k in NAMES)  # NaN is not
    return out


def _milliseconds(call: Callable[..., object], inputs: list[Array]) -> float:
    run = harness.wall(lambda: jax.block_until_ready(call(*inputs)))
    return rounded(1e3 * harness.timed(Action(run), warmups=1, calls=10).median)


def main() -> None:
    """Measures what the command line names."""
    parser = harness.parser(__doc__)
    parser.add_argument("--backends", default="cudnn", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--tokens", default="77,590,593,2129")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="bfloat16")
    flags = parser.parse_args()
    options = (flags.rows, flags.heads, flags.size, flags.dtype)
    out: Values = {"machine": harness.machine(), "dtype": flags.dtype, "backends": {}}
    cases, worst = [], []
    for backend in flags.backends.split(","):
        own = [measure(backend, int(n), *options) for n in flags.tokens.split(",")]
        out["backends"][backend] = own
        cases += own
        worst += [max(c["errors"][backend].values()) for c in own if backend in c["errors"]]
    out["summary"] = {"ok": all(c["ok"] for c in cases), "largest_error": max(worst, default=None)}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
