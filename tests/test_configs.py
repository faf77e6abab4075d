"""Every config under every argument: it can be built, and the published networks have their size.

``JOINTSEG_REFRESH_GOLDEN=1 python -m pytest tests/test_configs.py`` writes tests/golden again; read
the difference before committing it: a renamed parameter makes old checkpoints unreadable.
"""

import ast
import difflib
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from jointseg_jax import build, rules, sharding
from jointseg_jax.config import RunConfig, SystemConfig, from_plain, plain
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.models.uvit import UViT
from jointseg_jax.specs import make
from jointseg_jax.training import init_from
from jointseg_jax.training import state as states
from jointseg_jax.training.optimizer import OPTIMIZERS
from jointseg_jax.transport.schedules import ScaledLinear

parsed = RunConfig.parse


ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))

CLASSES = {"folders": 11, "voc": 21, "ade20k": 150, "coco_panoptic": 133}
CLASSES |= {"coco_stuff": 171, "celebamask_hq": 19, "cityscapes": 19}
DATA = {
    "quickstart": (),
    "jodiffusion_codec": ("scenes", "folders", "voc", "coco_panoptic", "ade20k"),
    "jodiffusion": ("scenes", "folders", "voc", "coco_panoptic", "ade20k"),
    "image_codec": ("scenes", "folders"),
    "semflow": ("scenes", "folders", "coco_stuff", "celebamask_hq", "cityscapes"),
    "pdm": ("scenes", "folders", "coco_panoptic"),
    "pdm_two_stream": ("scenes", "folders", "coco_panoptic"),
    "pdm_given_maps": ("scenes", "folders", "coco_panoptic"),
}
OTHERWISE = {
    "pdm": "instances",
    "pdm_two_stream": "stage=image",
    "pdm_given_maps": "streams=two",
}
"""An argument that makes another run of a config, in place of what it stands for by itself."""


def arguments(name):
    """Every argument a config is tested with."""
    found = ["", "smoke", *(f"data={n}" for n in DATA[name])]
    other = OTHERWISE.get(name)
    return found + [f"{a},{other}".removeprefix(",") for a in found if other]


def case(name, argument, smoke=True):
    """A config's smoke run and its last data set, and those of the tier thorough."""
    few = (f"data={DATA[name][-1]}" if DATA[name] else "", *(("smoke",) if smoke else ()))
    return pytest.param(name, argument, marks=() if argument in few else pytest.mark.thorough)


CASES = [case(name, argument) for name in DATA for argument in arguments(name)]
SHAPES = [case(name, argument, smoke=False) for name in DATA for argument in arguments(name)]
"""Where shapes of parameters are computed: a smoke run's are those of a launch (``tests/cli``)."""


@functools.cache
def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def config(name, argument=""):
    return module(name).get_config(argument).to_dict()


def facts(classes):
    names = tuple(f"class {i}" for i in range(classes))
    return DatasetInfo(Classes(names=names), ("a", "bus", "in", "rain"), ("a bus in rain",))


def facts_of(given, argument):
    """The facts of data that need no files; else made-up ones with the right number of classes."""
    if given["data"]["train"]["name"] == "scenes":
        return DatasetInfo.of(build.source(parsed(given), "train"), captions=2)
    named = dict(part.partition("=")[::2] for part in argument.split(","))
    return facts(CLASSES[named["data"]])


def system(name, argument, known, given):
    codecs = {}
    # in place of a trained codec: what its own config would train
    if name == "jodiffusion":
        codecs = {"mask": config("jodiffusion_codec", argument)["system"]["codec"]}
    if name == "semflow" and given["system"]["image"]["name"] == "trained":
        codecs = {"image": config("image_codec", "data=folders")["system"]["codec"]}
    return build.system(SystemConfig.parse(given["system"]), known, codecs)


def shapes_of(found):
    return jax.eval_shape(found.init, jax.random.key(0))


@functools.cache
def built(name, argument):
    """The system of a config, and the facts of its data."""
    given = config(name, argument)
    known = facts_of(given, argument)
    return system(name, argument, known, given), known


@functools.cache
def system_of(name, argument):
    """The system of a config, and the shapes of its parameters."""
    found, _ = built(name, argument)
    return found, shapes_of(found)


def count(shapes):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


# ------------------------------------------------------------------------ every config


def test_every_config_is_tested():
    assert sorted(DATA) == CONFIGS


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_config_is_data_under_lock(name, argument):
    found = module(name).get_config(argument)
    assert isinstance(found, ConfigDict) and found.is_locked
    with pytest.raises(AttributeError, match="stepz"):
        found.stepz = 1
    assert json.loads(json.dumps(plain(found.to_dict()))) == plain(found.to_dict())
    assert found.steps > 0 and found.batch % found.accumulate == 0
    assert RunConfig.parse(found.to_dict()).nan


@pytest.mark.parametrize(("name", "argument"), SHAPES)
def test_a_config_makes_a_system_and_rules_that_fit_it(name, argument):
    given = config(name, argument)
    _, shapes = system_of(name, argument)
    trainable = rules.match(shapes, given["trainable"], where="trainable", prefix="params/")
    optimizer = make(OPTIMIZERS, given["optimizer"], where="optimizer").build(given["steps"])
    state = jax.eval_shape(lambda params: states.create(params, trainable, optimizer), shapes)
    sharding.state_shardings(state, given["sharding"], sharding.make_mesh(given["mesh"]))
    moments, learning = count(state.opt), count(states.split(shapes, trainable)[0])
    assert learning < moments < 2 * learning + 100  # Muon has one, AdamW has two


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_config_read_back_from_json_makes_the_same_system(name, argument):
    given = config(name, argument)
    again = from_plain(json.loads(json.dumps(plain(given))))
    assert again == given
    found, known = built(name, argument)
    assert system(name, argument, known, again) == found


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_transforms_give_pairs_of_the_size_of_the_system(name, argument):
    given = config(name, argument)
    size = tuple(given["system"]["size"])
    build.evaluation_transforms(parsed(given))
    if given["data"]["train"]["name"] == "scenes":
        record = build.source(parsed(given), "val")[0]
        assert record["labels"].shape == size
    sizes = {tuple(t["size"]) for t in given["data"]["transforms"].values() if "size" in t}
    assert sizes <= {size} and build.transforms(parsed(given).data) is not None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mistaken_argument_is_named(name):
    get = module(name).get_config
    with pytest.raises(ValueError, match=r"config argument 'dat' is unknown; one of: .*smoke"):
        get("dat=voc")
    with pytest.raises(ValueError, match="'smoke=yes': smoke is a switch; write smoke alone"):
        get("smoke=yes")
    if DATA[name]:
        with pytest.raises(ValueError) as error:
            get("data=vox")
        expected = f"config argument data=vox is unknown; one of: {', '.join(DATA[name])}."
        assert str(error.value) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_docstring_has_the_command_the_hardware_and_what_to_expect(name):
    text = module(name).__doc__
    assert f"python launch/train.py --config configs/{name}.py --workdir runs/" in text
    assert "Expected" in text and "hardware" in text.lower()


RUN = "presets.run"
SETTINGS = ("seed", "steps", "batch", "ema", "data", "system", "optimizer")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_run_of_a_config_is_written_out_in_its_own_file(name):
    """No number of an experiment is a default of presets.run."""
    tree = ast.parse((ROOT / f"configs/{name}.py").read_text())
    runs = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == RUN]
    assert runs
    for call in runs:
        assert set(SETTINGS) <= {keyword.arg for keyword in call.keywords}


def documented():
    """Every ``configs/NAME.py:ARGUMENT`` that a docstring or a README names."""
    folders = ("configs", "launch", "tests", "jointseg_jax")
    pages = [page for folder in folders for page in (ROOT / folder).rglob("README.md")]
    pages += [page for folder in folders[:2] for page in (ROOT / folder).glob("*.py")]
    pages.append(ROOT / "README.md")
    pattern = re.compile(r"configs/(\w+)\.py(?::([\w=,]+))?")
    return sorted({pair for page in pages for pair in pattern.findall(page.read_text())})


@pytest.mark.parametrize(("name", "argument"), documented())
def test_documented_arguments_work(name, argument):
    assert module(name).get_config(argument).steps > 0


# ---------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("data", "predicts", "schedule"),
    [
        ("coco_panoptic", "noise", {"name": "scaled_linear", "time_offset": 1}),  # as published
        ("scenes", "data", {"name": "cosine"}),  # in pixels
        ("folders", "velocity", {"name": "cosine"}),
    ],
)
@pytest.mark.parametrize("name", ["pdm", "pdm_two_stream", "pdm_given_maps"])
def test_bit_pairs_share_one_time_and_schedule(name, data, predicts, schedule):
    """The map predicts its bits and its noise has deviation 2, whatever the image predicts."""
    made = config(name, f"data={data}")["system"]
    image, mask = (s["process"] for s in made["streams"].values())
    assert (image["predicts"], image.get("scale", 1.0)) == (predicts, 1.0)
    assert (mask["predicts"], mask["scale"]) == ("data", 2.0)
    assert image["schedule"] == mask["schedule"] and schedule.items() <= image["schedule"].items()
    assert made["times"]["name"] == "shared"
    if data != "scenes":  # a brief run spends its time where it is decided what is there
        assert made["times"]["distribution"] == {"name": "uniform", "steps": 1000}
    assert made["text_drop"] == 0.1 and made["solver"]["final"] == "evaluate"


@pytest.mark.parametrize(("name", "data"), [("pdm", "coco_panoptic"), ("jodiffusion", "voc")])
def test_the_schedule_of_stable_diffusion_is_the_default_one(name, data):
    schedule = config(name, f"data={data}")["system"]["streams"]["image"]["process"]["schedule"]
    offset = {"pdm": 1, "jodiffusion": 0}[name]  # U-ViT numbers from 1, diffusers from 0
    assert schedule.pop("time_offset") == offset and schedule.pop("name") == "scaled_linear"
    assert ScaledLinear(**schedule) == ScaledLinear()


def size_of(name, data, streams, **fields):
    """Parameters of a config's network with other streams, on 32 x 32 patches of 2."""
    denoiser = config(name, f"data={data}")["system"]["denoiser"]
    fields = {k: v for k, v in denoiser.items() if k != "name"} | fields
    patches = {"kind": "patches", "grid": (32, 32), "patch": 2}
    streams = {k: patches | v if "channels" in v else v for k, v in streams.items()}
    network = UViT(**fields, streams=streams, scan=True)
    return count(
        jax.eval_shape(network.init, jax.random.key(0), **network.input_shapes())["params"]
    )


def test_the_networks_of_the_image_stream_and_of_unidiffuser_have_their_published_size():
    """UniDiffuser's without the 26,112 that its diffusers port never uses."""
    image = {"channels": 4, "conv": True}
    context = {"kind": "tokens", "count": 77, "width": 768}
    assert size_of("pdm", "coco_panoptic", {"image": image}, context=context) == 44_692_644
    streams = {
        "text": {"kind": "tokens", "count": 77, "width": 64},
        "clip": {"kind": "tokens", "count": 1, "width": 512},
        "image": {"grid": (64, 64), "channels": 4},
    }
    assert size_of("jodiffusion", "voc", streams) == 952_509_520


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("data", ["voc", "coco_panoptic", "ade20k"])
def test_jodiffusion_has_its_published_size(data):
    _, shapes = system_of("jodiffusion", f"data={data}")
    unused = 26_112  # the diffusers port carries the projection of a position embedding it skips
    assert count(shapes) == 954_258_336 - unused == 954_232_224


def test_pdm_has_its_published_size():
    """The published count is that of the smallest map (factor 1): 8 x pooling, patches of 2."""
    given = config("pdm", "data=coco_panoptic")
    mask = given["system"]["streams"]["mask"]
    assert (mask["codec"]["pool"], mask["tokens"]["patch"]) == (4, 4)  # ours: factor 2
    _, ours = system_of("pdm", "data=coco_panoptic")
    mask["codec"]["pool"], mask["tokens"]["patch"] = 8, 2
    published = shapes_of(system("pdm", "data=coco_panoptic", facts(133), given))
    embedding = 8 * 2 * 2 * 512 + 512  # 8 bits, 2 x 2 cells; a second one exists and is not used
    assert count(published) == 44_874_508 - embedding
    # patches of 4 make three more times 8 x 2 x 2 weights of the way in, and of the way out
    assert count(ours) - count(published) == 3 * 8 * 2 * 2 * (512 + 512) + 3 * 8 * 2 * 2


def test_two_streams_have_their_published_size():
    """Again that of patch factor 1, with the biases of the released code."""
    given = config("pdm_two_stream", "data=coco_panoptic")
    mask = given["system"]["streams"]["mask"]
    mask["codec"]["pool"], mask["tokens"]["patch"] = 8, 2
    given["system"]["denoiser"]["exchange_bias"] = True
    shapes = shapes_of(system("pdm_two_stream", "data=coco_panoptic", facts(133), given))
    embedding = 8 * 2 * 2 * 512 + 512  # a second one exists and is not used
    projections = 13 * 262_656  # and so do the projections of the image stream into the map stream
    assert count(shapes) == 95_813_388 - embedding - projections


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("name", ["pdm_two_stream", "pdm_given_maps"])
@pytest.mark.parametrize("data", ["scenes", "folders", "coco_panoptic"])
def test_the_image_stage_becomes_the_image_stream(name, data):
    """Every parameter of the first stage lands, and the image stream then has all of its own."""
    argument = f"data={data}"
    _, image = system_of("pdm_two_stream", f"{argument},stage=image")
    second = argument if name == "pdm_two_stream" else f"{argument},streams=two"
    _, pair = system_of(name, second)
    starting = RunConfig.parse(config(name, second)).start
    given, wanted = (
        {f"params/{p}": leaf for p, leaf in rules.by_path(tree).items()} for tree in (image, pair)
    )
    found = init_from.remap(starting, given, wanted)
    assert len(found) == len(given)
    assert {p for p in wanted if "/image_stream/" in p or "/text/" in p} == set(found)


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("argument", ["smoke", "data=coco_panoptic"])
def test_given_maps_are_seen_clean_and_not_learnt(argument):
    for streams in ("one", "two"):
        made, shapes = system_of("pdm_given_maps", f"{argument},streams={streams}")
        assert made.known == ("mask",)
        given = config("pdm_given_maps", f"{argument},streams={streams}")
        trainable = rules.match(shapes, given["trainable"], where="trainable", prefix="params/")
        head = [t for p, t in rules.by_path(trainable).items() if "/mask_out/" in p]
        if (argument, streams) == ("smoke", "one"):  # a U-Net: map and image share every cell
            assert set(made.denoiser.grids) == {"image", "mask"} and not head
            continue
        assert made.denoiser.add_features == (("mask", "image"),)
        # project and conv with biases; up, conv_cell, cell and project with its bias
        assert len(head) == {"smoke": 5, "data=coco_panoptic": 4}[argument] and not any(head)


@pytest.mark.parametrize(
    ("data", "classes", "parameters"),
    [("voc", 21, 14_815_517), ("coco_panoptic", 81, 15_094_361), ("ade20k", 151, 15_418_143)],
)
def test_the_label_autoencoder_has_its_published_size(data, classes, parameters):
    """With the published numbers of classes: things of COCO, and a background everywhere."""
    argument = f"data={data}"
    given = config("jodiffusion_codec", argument)
    shapes = shapes_of(system("jodiffusion_codec", argument, facts(classes), given))
    assert count(shapes) == parameters


@pytest.mark.parametrize("argument", ["", "data=folders"])
def test_the_small_label_autoencoder_has_less_than_two_million_parameters(argument):
    assert count(system_of("jodiffusion_codec", argument)[1]) < 2_000_000


GOLDEN_CASES = (
    *("jodiffusion.voc", "jodiffusion_codec.voc"),
    *("pdm.coco_panoptic", "pdm_two_stream.coco_panoptic", "pdm_given_maps.coco_panoptic"),
    "semflow.coco_stuff",
)

POD = {"axis_sizes": (16, 16, 2), "axis_names": sharding.AXES}
"""The mesh on which golden texts say where parameters lie."""

PLACES = {"zero1": "opt", "fsdp": "params", "fsdp+model": "params"}
"""What is split by each preset: with zero1 the moments of a parameter."""


def places(shapes):
    """Path -> what each preset makes of the parameter on a pod."""
    mesh, found = jax.sharding.AbstractMesh(**POD), {}
    for preset, part in PLACES.items():
        specs = sharding.state_shardings({part: shapes}, preset, mesh)[part]
        for path, leaf in rules.by_path(specs).items():
            axes = ("+".join(a) if isinstance(a, tuple) else str(a or "-") for a in leaf.spec)
            found.setdefault(path, []).append(f"{preset}({','.join(axes)})")
    return {path: " ".join(specs) for path, specs in found.items()}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_parameters_are_those_of_the_golden_text(case):
    name, data = case.split(".")
    _, shapes = system_of(name, f"data={data}")
    placed = places(shapes)
    lines = [
        f"{path} {leaf.dtype}[{','.join(map(str, leaf.shape))}] {placed[path]}"
        for path, leaf in rules.by_path(shapes).items()
    ]
    text = "\n".join([*sorted(lines), f"total {count(shapes):,}", ""])
    path = GOLDEN / f"{case}.txt"
    if os.environ.get("JOINTSEG_REFRESH_GOLDEN") == "1":
        path.write_text(text)
    assert path.exists(), f"{path} is missing: refresh it (see above)"
    different = "\n".join(
        difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), lineterm="", n=0)
    )
    assert not different, f"other parameters than in {path.name}; refresh it:\n{different}"
