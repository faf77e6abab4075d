"""The commands that a run suggests at its end run as they were printed."""

import shlex


def printed(error):
    lines = error.split("what to run next:\n")[1].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def test_the_three_commands_run_as_printed(launch, launched):
    sample, evaluate, train = printed(launched.error)
    for script, *words in (sample, evaluate):
        launch(script.split("/")[1].removesuffix(".py"), *words)
    assert (launched.workdir / "mine/manifest.jsonl").exists()
    script, *words = train
    assert script == "launch/train.py"
    assert "steps" in launch("train", *words, "--validate").out
