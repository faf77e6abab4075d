"""Own times, rows, and a real trace of a real program."""

import jax
import jax.numpy as jnp
import pytest

from jointseg_jax.perf import trace
from jointseg_jax.perf.harness import ceiling
from jointseg_jax.perf.trace import Event


def test_own_time_is_without_what_is_inside():
    line = [
        Event("while.1", 0, 100),
        Event("dot.2", 10, 30),
        Event("call.3", 50, 40),
        Event("dot.4", 60, 20),
        Event("copy.5", 200, 7),
    ]
    assert sorted(trace.own_times(line)) == [
        ("call.3", 20),
        ("copy.5", 7),
        ("dot.2", 30),
        ("dot.4", 20),
        ("while.1", 30),
    ]
    assert sum(own for _, own in trace.own_times(line)) == 107  # nothing lost, nothing twice


def test_rows_join_what_differs_by_number_only():
    line = [
        Event("fusion.12", 0, 3e6),
        Event("fusion.40", 4e6, 1e6),
        Event("loop_add_fusion_3_1", 6e6, 4e6),
    ]
    rows = trace.table([line], {"fusion.12": "forward mlp", "fusion.40": "forward mlp"}, calls=2)
    assert rows[0][:2] in (("fusion", "forward mlp"), ("loop_add_fusion", trace.ELSEWHERE))
    found = {row.name: row for row in rows}
    assert found["fusion"] == ("fusion", "forward mlp", 2.0, 0.5, 1.0)
    assert found["loop_add_fusion"].milliseconds == 2.0
    assert trace._short("%fusion.7 = bf16[8]{0} fusion(%p)") == "fusion.7"


def test_lines_of_each_kind_of_device():
    class Line:
        def __init__(self, name, *events):
            self.name, self.events = name, events

    class Happened:
        start_ns, duration_ns = 0.0, 5.0

        def __init__(self, name, **stats):
            self.name, self.stats = name, stats.items()

    thunk, kernel = Happened("x", hlo_op="dot.1"), Happened("gemm_kernel")
    assert trace._operations("/host:CPU", Line("pool/1", thunk, kernel))[0].name == "dot.1"
    assert len(trace._operations("/host:CPU", Line("pool/1", thunk, kernel))) == 1
    assert trace._operations("/host:CPU", Line("python", thunk)) == []
    stream = trace._operations("/device:GPU:0", Line("Stream #7(Compute)", thunk, kernel))
    assert [event.name for event in stream] == ["dot.1", "gemm_kernel"]
    assert trace._operations("/device:GPU:0", Line("XLA Modules", kernel)) == []
    tpu = Line("XLA Ops", Happened("%fusion.3 = f32[2]{0} fusion(%p)"))
    assert [event.name for event in trace._operations("/device:TPU:0", tpu)] == ["fusion.3"]
    assert trace._operations("/device:TPU:0", Line("Steps", kernel)) == []


@pytest.fixture(scope="module")
def program():
    def steps(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]

    x, w = jax.random.normal(jax.random.key(0), (2, 64, 64))
    return jax.jit(steps).lower(x, w).compile(), x, w


def test_a_real_trace(program):
    compiled, x, w = program
    found = trace.traced(lambda: compiled(x, w).block_until_ready(), compiled.as_text())
    assert 0 < len(found["operations"]) <= trace.TOP
    names = {row["name"]: row for row in found["operations"]}
    products = [row for name, row in names.items() if "dot" in name or "ynn" in name]
    assert products and products[0]["count"] == 3  # one for each round of the loop
    assert sum(row["share"] for row in found["operations"]) <= 1.001  # four digits each
    assert found["parts"] == {trace.ELSEWHERE: 1.0}


def test_the_ceiling_is_a_rate_of_products():
    found = ceiling("float32", sizes=(32, 64), seconds=1e-3)
    assert found.size in (32, 64) and found.dtype == "float32"
    # a product of 64 x 64 takes at least a microsecond and at most a second, on any machine
    assert 2 * 64**3 / 1.0 < found.flops < 2 * 64**3 / 1e-6
