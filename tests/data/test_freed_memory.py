"""Arrays as large as pictures are made of memory that the process already has."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource
import numpy as np
from jointseg_jax.data import images
said = images.keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(50):
        np.ones(2 << 20, np.uint8), np.ones(3 << 20, np.uint8)
work()
before = pages()
work()
print(said, pages() - before)
"""
BOTH = 50 * (5 << 20) // 4096  # pages of all the arrays


def faults(**environment):
    clean = {k: v for k, v in os.environ.items() if k[:7] not in ("MALLOC_", "GLIBC_T")}
    run = [sys.executable, "-c", COUNT]
    done = subprocess.run(run, env=clean | environment, capture_output=True, text=True, check=True)
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.thorough
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
def test_pictures_take_the_memory_of_those_before_unless_the_user_says_otherwise():
    said, count = faults()
    assert said == "True" and count < BOTH / 50
    said, count = faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert said == "False" and count > BOTH / 2
