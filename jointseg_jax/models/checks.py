"""What a denoiser refuses: fields that make no network, and inputs that are not its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jointseg_jax.models.attention import ATTENTION
from jointseg_jax.models.embed import Patches, Spec, Tokens
from jointseg_jax.models.trunk import REMAT

NORMS = ("pre", "post")


def check_fields(module: nn.Module, *more: tuple[bool, str]) -> None:
    """Raises ValueError with everything that is wrong with a denoiser's fields.

    Args:
      more: (holds, what must hold) of fields that only this kind of denoiser has.
    """
    names = [n for n, _ in module.streams]
    reserved = {"class_token", "data_type", "context", *(f"time_{n}" for n in names)}
    step = 2 if module.heads % 2 else 1
    bad = []

    def require(holds: bool, text: str) -> None:
        bad.extend([] if holds else [text])

    good = all(isinstance(n, str) and n.isidentifier() and n not in reserved for n in names)
    require(
        bool(names) and good and len(set(names)) == len(names),
        f"streams: one or more different identifiers, none of {sorted(reserved)}; given {names}",
    )
    times = module.time_tokens
    require(
        bool(times) and set(times) <= set(names),
        f"time_tokens: one or more of the streams {names}; given {times}",
    )
    require(
        module.context is None or isinstance(module.context, Tokens),
        f"context: tokens or None; given {module.context}",
    )
    require(
        module.heads > 0 and module.width > 0 and module.width % (step * module.heads) == 0,
        f"width: even and a multiple of heads={module.heads}; given {module.width}",
    )
    require(module.depth >= 1, f"depth: at least 1; given {module.depth}")
    choices = {"norm": NORMS, "attention": ATTENTION, "remat": tuple(REMAT)}
    for holds, text in more:
        require(holds, text)
    for field, allowed in choices.items():
        value = getattr(module, field)
        require(value in allowed, f"{field}: one of {', '.join(allowed)}; given {value!r}")
    require(
        module.attention != "cudnn" or module.dtype in (jnp.bfloat16, jnp.float16),
        f"attention: cudnn needs dtype bfloat16 or float16; given dtype={module.dtype}",
    )
    require(*_additions(module))
    if bad:
        raise ValueError(f"{type(module).__name__}: " + "; ".join(bad) + ".")


def _additions(module: nn.Module) -> tuple[bool, str]:
    extents = {n: extent(s) for n, s in module.streams}
    pairs = module.add_features
    good = all(
        len(p) == 2 and p[0] != p[1] and set(p) <= set(extents) and not set(p) <= set(module.share)
        for p in pairs
    )
    good = good and all(extents[a] == extents[b] for a, b in pairs)
    return good, (
        "add_features: (from, to) pairs of streams on tokens of their own, with the same rows and "
        f"columns of tokens; given {pairs} and tokens {extents}"
    )


def extent(spec: Spec, size: tuple[int, int] | None = None) -> tuple[int, ...]:
    """Rows and columns of a stream's patches (at ``size`` or natively), or its token count."""
    if isinstance(spec, Patches):
        return spec.cells(spec.grid if size is None else size)
    return (spec.count,)


def check_call(
    module: nn.Module,
    latents: Mapping[str, Any],
    times: Mapping[str, Any],
    text: Any,
    class_id: Any,
    data_type: Any,
    taps: Any,
) -> None:
    """Raises ValueError about the first input that does not fit the denoiser."""
    where, specs = type(module).__name__, dict(module.streams)
    missing, unknown = sorted(set(specs) - set(latents)), sorted(set(latents) - set(specs))
    if missing or unknown:
        raise ValueError(
            f"{where}: the streams are {list(specs)}; latents lack {missing} and have {unknown} "
            "besides; change the latents or `streams`."
        )
    for name, spec in specs.items():
        spec.check(latents[name].shape, where=f"{where}: stream {name!r}")
    batches = {n: z.shape[0] for n, z in latents.items()}
    batch = next(iter(batches.values()))
    if set(batches.values()) != {batch}:
        raise ValueError(f"{where}: the streams differ in batch size: {batches}.")
    for together in (module.share, *module.add_features):
        grids = {n: extent(specs[n], latents[n].shape[1:3]) for n in together}
        if len(set(grids.values())) > 1:
            raise ValueError(
                f"{where}: streams that share tokens differ in their patches: {grids}."
            )
    absent = [n for n in module.time_tokens if n not in times]
    if absent:
        raise ValueError(f"{where}: times are {sorted(times)} and lack {absent} (`time_tokens`).")
    for name in module.time_tokens:
        _check_shape(where, f"times[{name!r}]", times[name], (), (batch,))
    _check_shape(where, "class_id", class_id, (batch,) if module.classes else None)
    _check_shape(where, "data_type", data_type, None, *([(batch,)] if module.data_types else []))
    words = None if module.context is None else (batch, *module.context.shape)
    _check_shape(where, "text", text, words)
    strange = [t for t in taps if t not in module.tap_names()]
    if strange:
        names = ", ".join(module.tap_names())
        raise ValueError(f"{where}: no tap {strange}; the taps are {names}.")


def _check_shape(where: str, what: str, value: Any, *wanted: tuple[int, ...] | None) -> None:
    shape = None if value is None else jnp.shape(value)
    if shape not in wanted:
        field = {"class_id": "classes", "data_type": "data_types", "text": "context"}.get(what)
        raise ValueError(
            f"{where}: {what} has shape {shape}, want {' or '.join(map(str, wanted))}"
            + (f"; change the input or `{field}`." if field else ".")
        )
