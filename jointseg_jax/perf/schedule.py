"""Cycles of our own attention kernels, read off the compiler's schedules; no TPU is needed.

  python -m jointseg_jax.perf.schedule --topology v5e:1x1 --heads 24 --tokens 2129
  python -m jointseg_jax.perf.schedule --topology v5p:2x2x1 --heads 8 --tokens 593 --queries 304,608

The estimate of ``launch/compile.py`` leaves kernels out, for the program's text has no cycles for
them. The compiler schedules them statically all the same: one bundle of instructions a cycle, and a
loop over the grid whose trip count is in the text. So

1. ``cycles = bundles in the loop x steps of the grid + bundles around it``. The loop is entered two
   times more than the grid has steps, to fetch the first blocks and to store the last ones. The
   cores of a chip (v5p: two) share the grid, and the loop is that of one of them.
2. ``of the peak`` = products of the kernel (forward 2, backward 5 or 7 with splash, over real
   tokens) / (cycles / clock x peak). With heads of 64 a product fills half of a 128 x 128 matrix
   unit, so that 50 % is all there is (a quarter of v6e's 256 x 256 units).

Waiting for memory and for the matrix unit is not in it: good for comparing kernels and blocks,
never a measured time.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from jointseg_jax import chips, sharding
from jointseg_jax.models import attention, packed_attention
from jointseg_jax.perf import harness
from jointseg_jax.types import Array, UserError

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*(?:[A-Z]{2}\s*)?:\s*(>*)")
LAST_TURN = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
FILE = re.compile(r"\d+-\w*?((?:packed|splash)_[a-z_]*[a-z])[_.\d]*-\d+-final_bundles\.txt")
FETCHES = 2
"""Turns of a kernel's loop that only move blocks."""

PRODUCTS = {"forward": 2, "packed": 5, "splash": 7}
"""Products of scores' size: of any forward pass, and of each backward pass."""


def cycles(text: str) -> int:
    """``bundles in the loop x steps of the grid + bundles around it``, from the final bundles.

    Raises:
      ValueError: there is no bundle, or more than the loop over the grid.
    """
    depths = [len(m.group(1)) for line in text.splitlines() if (m := BUNDLE.match(line))]
    turns = [int(n) for n in LAST_TURN.findall(text)]
    if not depths or len(turns) > 1:
        raise ValueError(f"schedule: {len(depths)} bundles and loops of {turns} turns; not known.")
    # The first turns fetch blocks and the last ones store them; those in between compute.
    steps = max(turns[0] - FETCHES, 1) if turns else 1
    # ">" marks a bundle inside a loop; there is one loop, over the grid.
    inside = sum(depth > 0 for depth in depths)
    return inside * steps + len(depths) - inside


def kernels(compile_it: Callable[[], None], folder: Path) -> list[tuple[str, int]]:
    """Compiles a program; its attention kernels' names and cycles, read from the dump folder.

    Raises:
      UserError: there are none.
    """
    # Schedules of the kernel before this one have other names and would be read too.
    for old in folder.iterdir():
        old.unlink()
    compile_it()
    found = ((FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    made = [(name.group(1), cycles(path.read_text())) for name, path in found if name]
    if not made:
        raise UserError(
            "ERROR [libtpu] this compiler wrote no schedule of an attention kernel; 0.0.51 does."
        )
    return made


def dump_to(folder: Path) -> None:
    """Tells libtpu, which must not be loaded yet, to write its last schedules there."""
    new = (
        f"--xla_jf_dump_to={folder}",
        "--xla_jf_dump_llo_text=true",
        "--xla_jf_dump_llo_pass_label_regex=final_bundles",
    )
    before = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join((before, *new)).strip()


def compile_attention(
    backend: str, device: jax.Device, flags: argparse.Namespace, queries: int | None
) -> None:
    """Compiles attention forward and backward, as the layers call it, for one device."""
    if backend == "packed":
        fields = {"heads": flags.heads, "count": flags.tokens, "queries": queries}
        attend = functools.partial(packed_attention.attend_packed, **fields)
        shape = (flags.rows, packed_attention.room(flags.tokens), flags.heads * flags.size)
    else:
        attend = functools.partial(attention.attend_splash, count=flags.tokens)
        shape = (flags.rows, flags.heads, attention.splash_room(flags.tokens), flags.size)
    mesh = sharding.make_mesh((1, 1, 1), [device])
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.replicated(mesh))

    def gradients(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, ...]:
        return jax.vjp(attend, q, k, v)[1](dy)

    with jax.set_mesh(mesh):
        jax.jit(gradients).lower(x, x, x, x).compile()


def lines(flags: argparse.Namespace, folder: Path) -> Iterator[str]:
    """The table, a line at a time."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    chip, device = chips.chip_of(flags.topology), chips.devices_of(flags.topology)[0]
    product = 2 * flags.tokens**2 * flags.heads * flags.size * flags.rows  # its FLOPs
    yield f"{'kernel':<36}{'queries':>8}{'1000 cycles':>13}{'of the peak':>13}"
    own = packed_attention.block(packed_attention.room(flags.tokens))
    tries = [int(n) for n in flags.queries.split(",")] if flags.queries else [own]
    for backend in flags.attention.split(","):
        for queries in tries if backend == "packed" else [None]:
            options = (backend, device, flags, queries)
            found = kernels(functools.partial(compile_attention, *options), folder)
            total, shown = sum(count for _, count in found), queries or ""
            for name, count in found:
                yield f"{name:<36}{shown:>8}{count / 1e3:>13,.1f}"
            flops = (PRODUCTS["forward"] + PRODUCTS[backend]) * product
            share = flops / (total / chip.clock) / chip.peak / 1e3
            yield f"{f'{backend}, together':<36}{shown:>8}{total / 1e3:>13,.1f}{share:>13.1%}"


def main() -> None:
    """Prints a line for each kernel."""
    parser = harness.parser(__doc__)
    parser.add_argument("--topology", default="v5e:1x1", help="v5e:1x1, v5p:2x2x1 or v6e:1x1")
    parser.add_argument("--attention", default="packed,splash", help="of packed, splash")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--tokens", type=int, default=2129)
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--queries", default="", help="blocks of packed to try; default: its own")
    with tempfile.TemporaryDirectory() as folder:
        dump_to(Path(folder))
        for line in lines(parser.parse_args(), Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
