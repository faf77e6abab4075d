"""One stream's features added to another's before its head, in one stream and in two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.models.embed import Patches, PatchesOut, Tokens
from jointseg_jax.models.two_stream import TwoStream
from jointseg_jax.models.uvit import UViT

REORDERED = 1e-4  # float32 sums in another order, grown through three blocks

IMAGE = Patches(grid=(4, 4), channels=2, patch=1, conv=True)
MASK = Patches(grid=(8, 8), channels=3, patch=2)
GIVEN = (("mask", "image"),)
NETWORKS = {"one": UViT, "two": TwoStream}


def build(network, **changes):
    fields = dict(
        streams={"image": IMAGE, "mask": MASK},
        time_tokens=("image",),
        width=16,
        depth=2,
        heads=2,
        add_features=GIVEN,
    )
    return NETWORKS[network](**fields | changes)


@functools.cache
def prepared(network):
    module, rng = build(network), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), **module.input_shapes(2))["params"]

    def draw(s):
        return jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32)

    return module, jax.tree.map(draw, shapes), jax.tree.map(draw, module.input_shapes(2))


@pytest.mark.thorough_but(1)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_image_head_reads_the_sum_and_the_map_head_its_own(network):
    """One stream: both normed. Two: the image normed, the map as it leaves its last block."""
    module, params, given = prepared(network)
    taps = ("norm", "map_stream/out_blocks/0") if network == "two" else ("norm",)
    run = jax.jit(lambda p: module.apply({"params": p}, **given, taps=taps))
    predictions, tapped = run(params)
    spans = module.spans()
    image = tapped["norm"][:, spans["image"]]
    mask = tapped[taps[-1]][:, spans["mask"]]
    homes = {"one": (params, params), "two": (params.get("image_stream"), params.get("map_stream"))}
    image_home, mask_home = homes[network]

    def head(spec, home, name, tokens):
        head = {"params": home[f"{name}_out"]}
        return PatchesOut(spec).apply(head, tokens, given["latents"][name])

    want = head(IMAGE, image_home, "image", image + mask)
    np.testing.assert_allclose(predictions["image"], want, rtol=REORDERED, atol=REORDERED)
    alone = head(IMAGE, image_home, "image", image)
    assert np.abs(predictions["image"] - alone).max() > 0.1
    want = head(MASK, mask_home, "mask", mask)
    np.testing.assert_allclose(predictions["mask"], want, rtol=REORDERED, atol=REORDERED)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_parameters_are_those_without_the_addition(network):
    shapes = [
        jax.eval_shape(m.init, jax.random.key(0), **m.input_shapes())
        for m in (build(network), build(network, add_features=()))
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "pairs",
    [
        (("mask", "depth"),),
        (("mask", "mask"),),
        (("mask", "image", "image"),),
    ],
)
def test_pairs_that_are_none_are_refused(network, pairs):
    with pytest.raises(ValueError, match=r"add_features: \(from, to\) pairs of streams .* given"):
        build(network, add_features=pairs)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "mask",
    [
        Patches(grid=(8, 8), channels=3, patch=1),
        Patches(grid=(4, 16), channels=3, patch=2),  # as many tokens, elsewhere
        Tokens(count=16, width=3),
    ],
)
def test_streams_without_partners_for_their_tokens_are_refused(network, mask):
    with pytest.raises(ValueError, match=r"add_features: .*'image': \(4, 4\), 'mask': \("):
        build(network, streams={"image": IMAGE, "mask": mask})


def test_streams_on_the_same_tokens_are_refused():
    with pytest.raises(ValueError, match="on tokens of their own"):
        build("one", share=("image", "mask"))


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes_that_differ_at_a_call_are_refused(network):
    module, params, given = prepared(network)
    latents = given["latents"] | {"image": jnp.zeros((2, 4, 8, 2))}
    with pytest.raises(ValueError, match=r"differ in their patches: .*\(4, 4\).*\(4, 8\)"):
        module.apply({"params": params}, **given | {"latents": latents})
