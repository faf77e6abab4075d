"""Two processes agree on which checkpoint is used, also when one alone sees the damage."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
folder, port, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.digest import state_digest

mesh = Mesh(np.array(jax.devices()), ("a",))
cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("a",), ()))

def place(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

def state_of(step):
    w = np.random.default_rng(step).normal(size=(400, 400)).astype(np.float32)
    return {"w": place(w, cut), "b": place(w[0], whole), "step": place(np.int32(step), whole)}

def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)

with Checkpoints(folder) as checkpoints:
    for step in (1, 2, 3):
        state = state_of(step)
        checkpoints.save(step, state, {})
        checkpoints.check()
multihost_utils.sync_global_devices("saved")
if rank == 0:
    path = largest(folder / "3" / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    path = largest(folder / "2" / "state" / "ocdbt.process_1")  # what rank 1 reads
    path.write_bytes(path.read_bytes()[:1000])
multihost_utils.sync_global_devices("damaged")
wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
with Checkpoints(folder) as checkpoints:
    found, meta = checkpoints.restore_newest(wanted)
    checkpoints.save(9, found, {})
print("result", meta["step"], state_digest(found) == state_digest(state_of(1)), flush=True)
"""


@pytest.mark.thorough
def test_damage_seen_by_one_process_is_damage_for_all(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), port, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        for rank in range(2)
    ]
    outs = [child.communicate(timeout=120) for child in children]
    for out, err in outs:
        assert "result 1 True" in out, err
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"1", "9", "2.damaged-unreadable", "3.damaged-digest"}
    # one warning line per damaged step, by the first process alone
    assert [err.count("is damaged") for _, err in outs] == [2, 0]
