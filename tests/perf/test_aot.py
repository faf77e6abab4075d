"""Programs compiled for chips that are not there: counting, stand-ins, reports, refusals."""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jointseg_jax import build, chips, rules, sharding
from jointseg_jax.config import RunConfig
from jointseg_jax.data.pipeline import batches
from jointseg_jax.perf import (
    abstract,
    costs,
    hlo,
    page,
    programs,
    report,
    schedule,
    sweep,
)
from jointseg_jax.perf.programs import Missing
from jointseg_jax.training import step
from jointseg_jax.types import UserError

ROOT = Path(__file__).parents[2]


def config(name, argument=""):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return RunConfig.parse(module.get_config(argument).to_dict())


# ------------------------------------------------------------------------- reading HLO

ROUND = """
%round (p: (s32[], bf16[8,16], s32[])) -> (s32[], bf16[8,16], s32[]) {
  %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %w = bf16[16,16]{1,0} constant({...})
  %y = bf16[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g = bf16[64,16]{1,0} all-gather(%y), channel_id=3, dimensions={0}
  %f = bf16[8,16]{1,0} fusion(%g), kind=kLoop, calls=%cut, backend_config={"estimated_cycles":"70"}
  %one = s32[] constant(1)
  %j = s32[] add(%i, %one)
  ROOT %t = (s32[], bf16[8,16]{1,0}, s32[]) tuple(%j, %f, %n)
}

%cut (q: bf16[64,16]) -> bf16[8,16] {
  %q = bf16[64,16]{1,0} parameter(0)
  ROOT %s = bf16[8,16]{1,0} slice(%q), slice={[0:8], [0:16]}
}
"""

CONDITION = """
%again (c: (s32[], bf16[8,16], s32[])) -> pred[] {
  %c = (s32[], bf16[8,16]{1,0}, s32[]) parameter(0)
  %at = s32[] get-tuple-element(%c), index=0
  LIMIT
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}
"""

ENTRY = """
ENTRY %main (a: bf16[8,16], b: s32[]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  %many = s32[] constant(9)
  %start = (s32[], bf16[8,16]{1,0}, /*index=2*/s32[]) tuple(%zero, %a, /*index=2*/%MANY)
  %loop = (s32[], bf16[8,16]{1,0}, s32[]) while(%start), condition=%again, body=%round KNOWN
  ROOT %result = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""

HERE = "%limit = s32[] constant(5)"
MOVED = "%limit = s32[] get-tuple-element(%c), index=2"


def looped(*, limit=HERE, known="", many="many"):
    entry = ENTRY.replace("KNOWN", known).replace("MANY", many)
    return hlo.Module("HloModule m\n" + ROUND + CONDITION.replace("LIMIT", limit) + entry)


@pytest.mark.parametrize(
    ("arguments", "rounds"),
    [
        ({}, 5),
        ({"limit": MOVED}, 9),
        ({"known": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
    ids=["constant in the condition", "constant among the initial values", "told"],
)
def test_what_is_in_a_loop_counts_as_often_as_it_runs(arguments, rounds):
    module = looped(**arguments)
    found = costs.costs(module)
    assert not module.unknown_loops
    assert found.flops == rounds * 2 * 8 * 16 * 16
    assert found.collectives == {"all-gather": costs.Traffic(rounds, rounds * 64 * 16 * 2)}
    assert sum(found.cycles.values()) == rounds * 70


def test_a_loop_that_ends_by_its_data_counts_once_and_is_named():
    module = looped(limit=MOVED, many="b")
    assert costs.costs(module).flops == 2 * 8 * 16 * 16
    assert module.unknown_loops == {"loop"}


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.Module(ROUND)


COLLECTIVES = """HloModule m

%all-reduce-scatter.1 (g: f32[4,8]) -> f32[1,8] {
  %g = f32[4,8]{1,0} parameter(0)
  %sum = f32[4,8]{1,0} all-reduce(%g), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[1,8]{1,0} dynamic-slice(%sum, %g), dynamic_slice_sizes={1,8}

%all-reduce-scatter.2 (g: f32[4,8]) -> f32[1,8] {
  %g = f32[4,8]{1,0} parameter(0)
  %sum = f32[4,8]{1,0} all-reduce(%g), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[1,8]{1,0} dynamic-slice(%sum, %g), dynamic_slice_sizes={1,8}
}

%begin (h: bf16[2,8]) -> bf16[8,8] {
  %h = bf16[2,8]{1,0} parameter(0)
  ROOT %ag1 = bf16[8,8]{1,0} all-gather(%h), channel_id=8, dimensions={0}
}

%finish (h2: bf16[2,8]) -> bf16[8,8] {
  %h2 = bf16[2,8]{1,0} parameter(0)
  ROOT %ag2 = bf16[8,8]{1,0} all-gather(%h2), channel_id=8, dimensions={0}
}

ENTRY %main (x: f32[4,8], y: bf16[2,8]) -> bf16[8,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = bf16[2,8]{1,0} parameter(1)
  %rs = f32[1,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %rt = f32[1,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %two = (f32[4,8]{1,0}, f32[]) all-reduce(%x, %x), channel_id=1, to_apply=%add
  %st = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%y), channel_id=2, dimensions={0}
  %dn = bf16[8,8]{1,0} all-gather-done(%st)
  %b = bf16[8,8]{1,0} fusion(%y), kind=kCustom, calls=%begin
  %k = bf16[8,8]{1,0} custom-call(%b), custom_call_target="tpu_custom_call"
  %z = bf16[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %e = bf16[8,8]{1,0} fusion(%y), kind=kCustom, calls=%finish
}
"""


def test_collectives_by_kind():
    found = costs.costs(hlo.Module(COLLECTIVES))
    assert found.collectives == {
        "all-reduce": costs.Traffic(1, 2 * 4 * 8 * 4),  # one of two arrays
        "all-gather": costs.Traffic(2, 2 * 8 * 8 * 2),  # channel 8 stands in two places, runs once
        # all-reduces of which a part is kept; they have one channel and are two
        "reduce-scatter": costs.Traffic(2, 2 * 4 * 8 * 4),
    }
    assert found.kernels == {"tpu_custom_call": 1}  # a buffer is no kernel


def convolution(left, right, made, labels, window=""):
    text = f"""ENTRY %main (l: f32[1], r: f32[1]) -> f32[1] {{
  %l = f32[{left}]{{3,2,1,0}} parameter(0)
  %r = f32[{right}]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[{made}]{{3,2,1,0}} convolution(%l, %r), {window}dim_labels={labels}
}}
"""
    return costs.costs(hlo.Module(text)).flops


def test_convolutions_count_what_falls_on_real_input():
    assert convolution("8,16", "16,32", "8,32", "bf_io->bf") == 2 * 8 * 16 * 32
    # 3x3 over 4x4, padded: of 3 taps a side 2 are inside at both ends
    same = convolution("1,4,4,5", "3,3,5,7", "1,4,4,7", "b01f_01io->b01f", SAME)
    assert same == 2 * 5 * 7 * (2 + 3 + 3 + 2) ** 2
    # a batched product as TPUs write it: the batch is a window as long as itself, of which one
    # position falls on each input
    batched = convolution("6,8,16", "6,16,32", "6,8,32", "0bf_0io->0bf", BATCHED)
    assert batched == 6 * 2 * 8 * 16 * 32
    spread = convolution("1,2,2,1", "2,2,1,1", "1,2,2,1", "b01f_01io->b01f", STRIDED)
    assert spread == 2 * 4  # lhs_dilate 2, stride 2: one of two taps a side


SAME = "window={size=3x3 pad=1_1x1_1}, "
BATCHED = "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, "
STRIDED = "window={size=2x2 stride=2x2 pad=0_1x0_1 lhs_dilate=2x2}, "


@pytest.mark.parametrize("stride,low,spread,step", [(1, 0, 1, 1), (2, 1, 1, 2), (3, -1, 2, 1)])
def test_taps_agree_with_a_convolution_of_ones(stride, low, spread, step):
    taken, kernel, made = 7, 3, 4
    ones = jnp.ones((1, taken, 1))
    high = (made - 1) * stride + (kernel - 1) * step + 1 - ((taken - 1) * spread + 1) - low
    out = jax.lax.conv_general_dilated(
        ones,
        jnp.ones((kernel, 1, 1)),
        (stride,),
        [(low, high)],
        lhs_dilation=(spread,),
        rhs_dilation=(step,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    assert out.shape == (1, made, 1)
    assert costs._taps(taken, kernel, made, stride, low, spread, step) == int(out.sum())


def test_products_of_a_real_program_with_loops():
    def chain(w, x):
        y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        return jnp.sum(y @ w[0].T)

    w, x = jnp.zeros((6, 32, 32)), jnp.zeros((16, 32))
    text = jax.jit(jax.grad(chain)).lower(w, x).compile().as_text()
    module = hlo.Module(text)
    one = 2 * 16 * 32 * 32
    # forward: 6 in the scan; nobody needs what the last one makes, for its gradient is ones.
    # backward: two per product, also in the scan's first round (a loop has one body).
    assert costs.costs(module).flops == (6 + 2 * 6 + 2) * one
    assert not module.unknown_loops


SQUARES = """HloModule m

%inside (s: f32[2,300,512]) -> bf16[2,300] {
  %s = f32[2,300,512]{2,1,0} parameter(0)
  %e = f32[2,300,304]{2,1,0} exponential(%s)
  ROOT %r = bf16[2,300]{1,0} reduce(%e), dimensions={2}
}

ENTRY %main (x: f32[2,300,512]) -> bf16[2,300] {
  %x = f32[2,300,512]{2,1,0} parameter(0)
  MADE
  ROOT %f = bf16[2,300]{1,0} fusion(%x), kind=kLoop, calls=%inside
}
"""


def test_scores_in_memory_are_seen_and_those_inside_a_kernel_are_none():
    made = '%m = (f32[2,300,384]{2,1,0}, s32[]) custom-call(%x), custom_call_target="c"'
    module = hlo.Module(SQUARES.replace("MADE", made))
    assert costs.costs(module, [300]).squares == ("f32[2,300,384]",)  # 384: with its padding
    assert costs.costs(module, [100, 200]).squares == ()  # short: their scores are small
    assert costs.costs(hlo.Module(SQUARES.replace("MADE", "")), [300]).squares == ()


# ------------------------------------------------------------------- standing in for data


@pytest.mark.parametrize(
    ("name", "argument"),
    [("quickstart", "smoke"), ("pdm", "smoke,instances"), ("semflow", "smoke")],
)
def test_a_batch_has_the_fields_that_the_pipeline_makes(name, argument):
    given = config(name, argument)
    known = abstract.dataset_info(given)
    system = build.system(given.system, known)
    tokenizer = build.tokenizer(given.system, known.vocabulary) if system.text else None
    with batches(
        build.source(given, "train"),
        given.data,
        batch=8,
        seed=0,
        transforms=build.transforms(given.data),
        tokenizer=tokenizer.encode if tokenizer else None,
        instances=build.instances(given),
    ) as host:
        real = sharding.global_batch(next(host), sharding.make_mesh((8, 1, 1)))
    expected = abstract.batch_shapes(given, system, 8)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }


def test_precomputed_features_have_the_shapes_that_streams_and_text_read():
    given = config("jodiffusion", "data=voc")
    known = abstract.dataset_info(given)
    assert len(known.classes) == 21 and known.vocabulary == ()
    codec = config("jodiffusion_codec", "data=voc").system
    found = abstract.codecs(given, known, codec)
    assert found.specs["mask"]["scale"] == 0.2 and found.frozen["mask"]
    system = build.system(given.system, known, found.specs)
    shapes = {k: v.shape for k, v in abstract.batch_shapes(given, system, 4).items()}
    assert shapes == {
        "image": (4, 512, 512, 3),
        "labels": (4, 512, 512),
        "text": (4, 77, 768),
        "clip": (4, 1, 512),
        "image_latents": (4, 64, 64, 4),
    }


def test_what_cannot_be_known_must_be_told():
    given = config("pdm", "data=folders").replace({"data.train.root": "nowhere"})
    with pytest.raises(UserError, match=r"root = nowhere: not on this machine.*--classes=N"):
        abstract.dataset_info(given)
    assert len(abstract.dataset_info(given, classes=11).classes) == 11
    given = config("jodiffusion", "data=voc")
    with pytest.raises(UserError, match=r"runs/codec is not on this machine.*jodiffusion_codec"):
        abstract.codecs(given, abstract.dataset_info(given))
    with pytest.raises(UserError, match=r"a codec of labels is needed.*of image"):
        abstract.codecs(given, abstract.dataset_info(given), config("image_codec").system)
    with pytest.raises(UserError, match=r"--remat: these change the denoiser.*autoencode"):
        abstract.with_denoiser(config("image_codec"), remat="full", scan=None)


# ------------------------------------------------------------------------------ programs


def on_hosts(lowered):
    return report.compiled(lowered, chips.CHIPS["v5e"])[0]


def parameters(given):
    system = build.system(given.system, abstract.dataset_info(given))
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.thorough
def test_the_update_of_training_on_other_devices(small, check_gradients, check_products):
    """On the CPU's eight: what the compiler says there is of the same kind."""
    given = small
    lowered = programs.lower_training(given, jax.devices(), missing=Missing(), per_chip=2)
    assert (lowered.mesh, lowered.batch) == ((8, 1, 1), 16)
    found = on_hosts(lowered)
    values = found.values()
    assert values["fits"] and values["hbm_gb"] > 0
    gradients = 4 * parameters(given)
    moved = sum(t.bytes for t in found.costs.collectives.values())
    check_gradients(gradients, moved)
    assert lowered.ideal == gradients
    assert values["collective_ratio"] == pytest.approx(moved / gradients, rel=1e-4)  # rounded
    check_products(found.costs.flops * found.chips / lowered.flops)
    assert values["estimate_ms"] is None and values["step_ms"] is None  # CPUs count no cycles
    assert values["roofline_ms"] == pytest.approx(lowered.flops / 8 / 197e9, rel=1e-4)  # rounded


@pytest.mark.thorough
def test_the_sampler_needs_no_collective(small, check_products):
    lowered = programs.lower_sampling(small, jax.devices(), missing=Missing(), per_chip=2, steps=4)
    found = on_hosts(lowered)
    assert lowered.batch == 16
    assert found.costs.collectives == {} and found.values()["collective_ratio"] is None
    check_products(found.costs.flops * found.chips / lowered.flops)


@pytest.mark.thorough
def test_a_frozen_codec_is_part_of_the_program():
    given, codec = config("jodiffusion", "smoke"), config("jodiffusion_codec", "smoke").system
    lowered = programs.lower_training(given, jax.devices(), missing=Missing(codec=codec))
    assert lowered.batch == 8 and "12 classes" in lowered.notes[0]


@pytest.mark.parametrize(
    ("preset", "mesh", "per_number"),
    [
        ("replicate", (8, 1, 1), 4),
        ("fsdp", (1, 8, 1), 12),  # two gathers, one reduce-scatter
        ("fsdp", (2, 4, 1), 13),  # and a quarter over the other axis
        ("zero1", (8, 1, 1), 8),  # reduce-scatter, and the new parameter
    ],
)
def test_ideal_collectives_by_the_places_of_parameters(preset, mesh, per_number, small):
    given = abstract.with_denoiser(small, width=512, heads=2)
    given = given.replace({"sharding": preset, "mesh": mesh})
    system = build.system(given.system, abstract.dataset_info(given))
    made = step.make_train_step(system, given, sharding.make_mesh(mesh))
    leaves = rules.by_path(made.state.params)
    ways = r"_(in|out)/" if preset == "fsdp" else "none"  # which fsdp leaves whole
    split = [p for p, x in leaves.items() if x.size >= sharding.SMALL and not re.search(ways, p)]
    large = sum(leaves[path].size for path in split)
    small_ones = sum(leaf.size for leaf in leaves.values()) - large
    assert large > 10 * small_ones > 0
    assert costs.ideal_bytes(made, "float32") == per_number * large + 4 * small_ones


def test_mistakes_are_refused():
    given, devices = config("quickstart", "smoke"), jax.devices()
    with pytest.raises(UserError, match=r"batch = 12: must be a multiple.*--batch_per_chip=N"):
        programs.lower_training(given.replace({"batch": 12}), devices, missing=Missing())
    with pytest.raises(UserError, match=r"config.mesh = \(3, 1, 1\)"):
        programs.lower_training(given.replace({"mesh": (3, 1, 1)}), devices, missing=Missing())
    with pytest.raises(UserError, match="trains a codec; it makes no pairs"):
        programs.lower_sampling(config("image_codec", "smoke"), devices, missing=Missing())
    with pytest.raises(UserError, match=r"exactly one of .*--given=labels or --given=image"):
        programs.lower_sampling(config("semflow", "smoke"), devices, missing=Missing())
    with pytest.raises(UserError, match=r"--steps=0"):
        programs.lower_sampling(given, devices, missing=Missing(), steps=0)


# ------------------------------------------------------------------------------- reports


def lowered(batch=64):
    return programs.Lowered(
        program=None, mesh=(2, 2, 1), batch=batch, flops=4e12, notes=("21 classes, no words",)
    )


def test_a_page_and_its_values():
    made = report.Report(
        lowered=lowered(),
        chip=chips.CHIPS["v5e"],
        seconds=12.34,
        memory=report.Memory(
            arguments=2.0, outputs=2.0, shared=1.5, temporaries=11.5, code=0.1, peak=14.0
        ),
        costs=costs.Costs(
            flops=int(1.25e12),
            collectives={"all-gather": costs.Traffic(62, int(3.6e9))},
            cycles={"forward qkv": 3_000_000, "outside the network": 1_500_000},
            kernels={"tpu_custom_call": 31},
        ),
    )
    values = made.values()
    assert values["fits"] and values["hbm_share"] == pytest.approx(14 / 15.75, abs=1e-3)  # rounded
    assert values["roofline_ms"] == pytest.approx(1e12 / 197e12 * 1e3, rel=1e-4)  # rounded
    assert values["estimate_ms"] == pytest.approx(3.0)  # 4.5 M cycles at 1.5 GHz
    assert values["ici_ms"] == pytest.approx(20.0)  # 3.6 GB over 4 links of 45 GB/s
    text = page.report_page(made, "train of C on v5e:2x2")
    for line in (
        r"chips +4 +mesh data 2 x fsdp 2 x model 1",
        r"batch +64 +16 per data-parallel shard",
        r"peak +14.000 GiB +88.9% of 15.75 GiB: fits, but above 85%: tight",
        r"all-gather +3.6000 GB +62 per run",
        r"matmul FLOPs +1.25 TFLOP +1.250 x analytic",
        r"estimated computation +3 ms +by the compiler's cycles; not measured",
        r"not in the estimate +31 x +tpu_custom_call",
    ):
        assert re.search(line, text), line
    assert max(map(len, text.splitlines())) <= 100


MESSAGE = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total \
memory required for HLO temporaries (84.31G) exceeds available HBM (15.75G). HLO module: jit_f.
=== Source Location Trace: ===
learning/45eac/tfrc/runtime/thing.cc:370

  1. Size: 24.00G
     Shape: bf16[6,65536,65536]
See https://openxla.org/xla/errors/error_1000 for more details.
"""


class Refusing:
    """A program that the compiler refuses."""

    def __init__(self, message):
        self.message = message

    def compile(self, compiler_options):
        raise jax.errors.JaxRuntimeError(self.message)


def test_what_does_not_fit_is_reported_in_the_compilers_words():
    program = programs.Lowered(
        program=Refusing(MESSAGE), mesh=(4, 1, 1), batch=8, flops=None, notes=()
    )
    made, text = report.compiled(program, chips.CHIPS["v5e"])
    values = made.values()
    assert text == "" and values["fits"] is False and values["roofline_ms"] is None
    assert values["refusal"].splitlines()[-1] == "     Shape: bf16[6,65536,65536]"
    assert "Source Location" not in values["refusal"] and "https" not in values["refusal"]
    shown = page.report_page(made, "heading")
    assert "DOES NOT FIT" in shown
    assert "(84.31G) exceeds available HBM (15.75G)" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 100


def test_another_refusal_of_the_compiler_is_the_users_mistake():
    program = programs.Lowered(
        program=Refusing("INVALID_ARGUMENT: No such compile option: 'xla_tpu_speed'"),
        mesh=(4, 1, 1),
        batch=8,
        flops=None,
        notes=(),
    )
    with pytest.raises(UserError, match=r"\[compiler\].*No such compile option"):
        report.compiled(program, chips.CHIPS["v5e"])


# --------------------------------------------------------------------------------- sweep


def stand_in(lowered, chip, options):
    """A compiler for which more rows need more memory, and remat makes slower and smaller."""
    rows = lowered.batch / 8
    full = lowered.passes > 1.6
    made = report.Report(
        lowered=lowered,
        chip=chip,
        seconds=1.0,
        memory=report.Memory(
            arguments=1.0,
            outputs=1.0,
            shared=1.0,
            temporaries=rows,
            code=0.0,
            peak=rows * (3.0 if full else 6.0),
        ),
        costs=costs.Costs(
            flops=1,
            collectives={},
            cycles={"forward": int(1.5e6 * (1 + rows) * (1.3 if full else 1.0))},
            kernels={},
        ),
    )
    return made, ""


@pytest.fixture
def unlowered(monkeypatch):
    """No program, only what is known of it before it is lowered."""

    def lower(given, devices, missing):
        mesh = sharding.make_mesh(given.mesh, devices).devices.shape
        passes = 5.5 / 3 if given.system.denoiser["remat"] == "full" else 1.5
        return programs.Lowered(
            program=None, mesh=mesh, batch=given.batch, flops=8e9, notes=(), passes=passes
        )

    monkeypatch.setattr(programs, "lower_training", lower)


def test_a_sweep_picks_the_fastest_that_fits(unlowered, small):
    grid = sweep.Grid(
        attention=["xla"], sharding=["replicate", "fsdp"], remat=["none", "full"], rows=[4, 1, 2]
    )
    found = [
        *sweep.trials(
            small,
            jax.devices(),
            chips.CHIPS["v5e"],
            grid,
            missing=Missing(),
            options={},
            compiled=stand_in,
        )
    ]
    shown = [(t.setting.sharding, t.setting.remat, t.setting.rows, t.fits) for t in found]
    one = [("none", 1, True), ("none", 2, True), ("none", 4, False)]
    one += [("full", 1, True), ("full", 2, True), ("full", 4, True)]
    assert shown == [(preset, *t) for preset in ("replicate", "fsdp") for t in one]
    assert {t.setting.sharding: t.mesh for t in found} == {
        "replicate": (8, 1, 1),
        "fsdp": (1, 8, 1),
    }
    best = sweep.best(found)  # per row: 1.5 ms with none at 2, 1.625 with full at 4
    assert best.setting == sweep.Setting("xla", "replicate", "none", 2)
    assert sweep.values(best)["image_ms"] == pytest.approx(1.5)
    text = "\n".join(sweep.lines_to_use(best))
    assert "--config.batch=16" in text and "remat" in text and "none" in text
    assert "too tight" in sweep.line(found[2]) and "too tight" not in sweep.line(best)


@pytest.mark.parametrize(
    ("sharding", "mesh", "want"),
    [
        ("zero1", (-1, 1, 1), (-1, 1, 1)),
        ("zero1", (-1, 4, 1), (-1, 1, 1)),
        ("fsdp", (-1, 1, 1), (-1, 16, 1)),
        ("fsdp", (8, 8, 1), (8, 8, 1)),
        ("fsdp+model", (-1, 1, 1), (-1, 16, 2)),
        ("fsdp+model", (4, 4, 4), (4, 4, 4)),
    ],
)
def test_a_sweep_splits_the_state_as_the_preset_asks(sharding, mesh, want, small):
    setting = sweep.Setting("xla", sharding, "none", 2)
    made = sweep.configured(small.replace({"mesh": mesh}), setting, 64)
    assert made.mesh == want and made.sharding == sharding
    assert made.batch == 2 * 64 // want[2]


def test_a_setting_that_is_refused_is_a_row_of_its_own(small):
    grid = sweep.Grid(attention=["flash"], sharding=["replicate"], remat=["none"], rows=[1, 2])
    run = functools.partial(sweep.trials, small, jax.devices(), chips.CHIPS["v5e"], grid)
    found = [*run(missing=Missing(), options={}, compiled=stand_in)]
    assert len(found) == 1 and not found[0].fits and sweep.best(found) is None
    assert "refused" in sweep.line(found[0]) and "attention: one of" in sweep.line(found[0])


# ------------------------------------------------------------------------------ schedule

BUNDLES = """
LH: loop header
     0   :  { %s0 = inlined_call_operand.<no memory space> [shape: s8[1,1,1]] }
   0x1   :  { %s1 = smov.u32 0 }
   0x2 LB: > { %v1 = vld [vmem:[%s0] sm:$0xff] ;;  %522 = sbr.rel (%p6) target = $region36 }
   0x3 PB: > { %v2 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x4   : > { %p7 = scmp.ge.s32.totalorder %s34_s26, 10 /* loop exit test */ }
   0x5   :  { %33 = sbr.rel (!%p7) target = $region164 }
"""


def test_cycles_of_a_kernel_are_its_bundles_in_every_step():
    assert schedule.cycles(BUNDLES) == 3 * (10 - 2) + 3  # two turns only move blocks
    with pytest.raises(ValueError, match="0 bundles"):
        schedule.cycles("nothing")
    with pytest.raises(ValueError, match=r"loops of \[10, 10\] turns"):
        schedule.cycles(BUNDLES + BUNDLES)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("1795-packed_attention.31-01-final_bundles.txt", "packed_attention"),
        (
            "1795-transpose_jvp_packed_attention_backward__.1-01-final_bundles.txt",
            "packed_attention_backward",
        ),
        ("1795-splash_mha_dq_no_residuals.1-72-final_bundles.txt", "splash_mha_dq_no_residuals"),
        ("1795-packed_attention.1-00-schedule-analysis_final_bundles.txt", None),
        ("1795-copy.7-66-final_bundles.txt", None),
    ],
)
def test_schedules_of_kernels_are_known_by_their_names(name, kernel):
    found = schedule.FILE.fullmatch(name)
    assert (found and found.group(1)) == kernel


# ------------------------------------------------------------------------------- libtpu


@pytest.mark.parametrize("name", ["v5e", "v7:2x2", "v5e:2xx2", "tpu"])
def test_an_unknown_generation_is_refused_with_examples(name):
    with pytest.raises(UserError, match=rf"--topology={name}: give GENERATION:SHAPE.*v5p:4x4x4"):
        chips.devices_of(name)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jointseg_jax\[tpu\]'"):
        chips.devices_of("v5e:2x2")
