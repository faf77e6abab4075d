"""What a launch says before its first update: what will happen, and where to look."""

from __future__ import annotations

from pathlib import Path

from jointseg_jax.config import RunConfig


def opening(config: RunConfig, workdir: Path, step: int) -> str:
    """Returns a few lines for a launch that begins at a step."""
    begins = (
        f"goes on at step {step:,} of {config.steps:,}" if step else f"{config.steps:,} updates"
    )
    first = "the first update is compiled before it runs (seconds to minutes)"
    lines = [f"{begins}, {config.batch:,} rows each: {first}, then lines end with the time left"]
    if times := _times(config, step):
        lines.append(f"pictures: {workdir / 'samples'}, {times}")
    lines.append(f"curves: {workdir / 'metrics.jsonl'}, tensorboard --logdir {workdir}")
    if config.finish.num:
        lines[-1] += f" | at the end {config.finish.num:,} pairs are made and measured"
    return "\n".join(lines)


def _times(config: RunConfig, step: int) -> str:
    """When samples are drawn, in words; empty if they never are."""
    every, steps = config.preview.every, config.steps
    if not every:
        return ""
    early = [*config.preview.early(steps), *([every] if every < steps else [])]
    coming = [f"{s:,}" for s in early if s > step]
    often = [f"every {every:,}"] if 2 * every <= steps else []
    if not (coming or often):
        return "after the last"
    return "after step " * bool(coming) + ", ".join([*coming, *often, "and the last"])
