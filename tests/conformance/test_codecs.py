"""Analog bits and the label autoencoder against the reference numbers, of any configuration."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax.codecs.bits import Bits
from jointseg_jax.codecs.label_ae import LabelAE, cross_entropy
from jointseg_jax.codecs.point_loss import Draws, PointLoss, class_loss, mask_losses, objects
from jointseg_jax.types import FILE_VOID, VOID
from jointseg_jax.weights.label_vae import from_reference, to_reference

HIGHEST = jax.default_matmul_precision("highest")
PROB_THRESHOLD = 0.5
"""Of every label autoencoder fixture: in its notes, not in its config."""


@pytest.mark.cases("analog_bits*")
def test_integers_to_analog_bits_and_back(case):
    inputs, outputs, scale = case.inputs, case.outputs, float(case.config["b_scale"])

    def codec_of(words):
        # The number of bits is an array's own: the list of values and the map may differ in it.
        bits = words.shape[-1]
        return Bits(classes=2**bits, bits=bits, void="forbid", scale=scale)

    values = inputs["values"].reshape(1, 1, -1)
    analog = [k for k in outputs if k.startswith("analog")]
    assert analog
    for name in analog:
        codec, bits = codec_of(outputs[name]), name.replace("analog", "bits")
        encoded = codec.encode({}, values)
        case.check(bits, (encoded[0, 0] > 0).astype(jnp.float32))
        case.check(name, encoded[0, 0])
        np.testing.assert_array_equal(codec.decode({}, encoded)[0, 0], outputs["roundtrip"])

    codec = codec_of(outputs["noisy_analog_2d"])
    noisy = codec.encode({}, inputs["values_2d"][None])[0] + inputs["analog_noise"]
    case.check("noisy_analog_2d", noisy)
    np.testing.assert_array_equal(
        codec.decode({}, outputs["noisy_analog_2d"][None])[0], outputs["noisy_decoded_2d"]
    )


@pytest.mark.cases("analog_bits*")
def test_plain_min_pooling_of_raw_id_maps(case):
    inputs, outputs = case.inputs, case.outputs
    pooled = [re.fullmatch(r"minpool(\d+)_(\d+)", name) for name in outputs]
    pooled = [match for match in pooled if match]
    assert pooled
    for match in pooled:
        raw, pool = inputs[f"map_{match[2]}"], int(match[1])
        codec = Bits(classes=int(raw.max()) + 1, order="msb", pool=pool, pooling="parity_min")
        there_and_back = jax.jit(lambda x, c=codec: c.decode({}, c.encode({}, x)))
        got = there_and_back(raw[None] - 1)[0, ::pool, ::pool] + 1  # raw id 0 is void
        np.testing.assert_array_equal(got, outputs[match[0]])


def autoencoder(case) -> LabelAE:
    model = dict(case.config["model"])
    assert model.pop("num_latents") == 2  # mean and log variance
    return LabelAE(
        classes=model.pop("out_channels"),
        bits=model.pop("in_channels"),
        background="zero",
        void="low_bits",
        widths=model.pop("block_out_channels"),
        middle_width=model.pop("intermediate_channels"),
        middle_blocks=2 if model.pop("num_mid_blocks") else 0,
        up_widths=[model.pop("upscale_channels")] * model.pop("num_upscalers"),
        latent_channels=model.pop("latent_channels"),
        groups=model.pop("norm_num_groups"),
        latent="sample",
        scale=float(model.pop("scaling_factor", 0.2)),
        prob_threshold=PROB_THRESHOLD,
        **model,
    )


def labels_of(case):
    labels = case.inputs["labels"].astype(np.int32)
    return np.where(labels == FILE_VOID, VOID, labels)


def channels_last(x):
    return np.moveaxis(x, 1, -1)


@pytest.mark.cases("jodiffusion_label_vae*")
def test_encoder_and_decoder(case):
    codec, inputs, labels = autoencoder(case), case.inputs, labels_of(case)
    params = from_reference(codec, case.weights)
    assert codec.channels == Bits(classes=codec.classes, background="zero", void="forbid").channels
    noise, z = channels_last(inputs["noise"]), codec.scale * channels_last(inputs["z"])

    @jax.jit
    def forward(params, labels):
        words = codec.analog(labels)
        mean, std = codec.moments(params, labels)
        sample = mean + std * noise
        decoder_in = codec.scale * jnp.concatenate([sample, mean])
        raw = codec.logits(params, decoder_in, interpolate=False)
        got = {
            "bits": (words + 1) / 2,
            "moments": codec.encoder.apply({"params": params["encoder"]}, words),
            "mean": mean,
            "std": std,
            "latent_sample": sample,
            "logits_sample": raw[: len(labels)],
            "logits_mode": raw[len(labels) :],
            "decode_z": codec.logits(params, z),
        }
        return got, *codec.decode_with_confidence(params, z)

    with HIGHEST:
        got, thresholded, confidence = forward(params, labels)
    for name, value in got.items():
        case.check(name, value, want=channels_last(case.outputs[name]))
    logits = got["decode_z"]
    # Labels are exact but where two classes, or a probability and its threshold, are as close as
    # the tolerance on logits, which leaves the order to rounding.
    slack = 2 * case.meta["tolerance"]["atol"]
    best, second = np.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
    clear = best - second > slack + 2 * case.meta["tolerance"]["rtol"] * abs(best)
    sure = clear & (abs(confidence - codec.prob_threshold) > slack)
    assert np.mean(sure) > 0.98
    labels = jnp.argmax(logits, -1)
    np.testing.assert_array_equal(labels[clear], case.outputs["decode_z_argmax"][clear])
    np.testing.assert_array_equal(
        thresholded[sure], case.outputs["decode_z_pred_thresholded"][sure]
    )


@pytest.mark.cases("jodiffusion_label_vae*")
def test_weights_return_unchanged(case):
    codec, weights = autoencoder(case), case.weights
    back = to_reference(codec, from_reference(codec, weights))
    assert sorted(back) == sorted(weights)
    assert all(np.array_equal(back[k], weights[k]) for k in weights)
    assert sum(w.size for w in weights.values()) == case.meta["num_parameters"]


@pytest.mark.cases("jodiffusion_label_vae*")
def test_losses(case):
    codec, inputs, outputs, labels = autoencoder(case), case.inputs, case.outputs, labels_of(case)
    logits = jnp.asarray(channels_last(outputs["logits_sample"]))
    labels = jnp.asarray(labels)
    if "loss_ce" in outputs:
        case.check("loss_ce", cross_entropy(logits, labels))

    loss = point_loss_of(case)
    _, present = objects(labels, codec.classes, codec.classes)
    present = np.asarray(present)

    def slotted(draws):  # the reference draws for present objects only, image by image
        full = np.zeros((*present.shape, *draws.shape[1:]), np.float32)
        full[present] = draws
        return jnp.asarray(full)

    draws = Draws(
        jnp.asarray(inputs["draw_ce_candidates"]),
        jnp.asarray(inputs["draw_ce_random"]),
        slotted(inputs["draw_mask_candidates"]),
        slotted(inputs["draw_mask_random"]),
    )

    @jax.jit
    def sampled(logits, labels, draws):
        points = loss.class_points(logits, labels, draws), loss.mask_points(logits, labels, draws)
        return *points, class_loss(points[0]), *mask_losses(points[1])

    class_points, mask_points, point_ce, bce, dice = sampled(logits, labels, draws)
    same_points(
        case,
        np.moveaxis(outputs["ce_point_logits"], 1, -1),
        class_points.logits,
        np.where(outputs["ce_point_labels"] == FILE_VOID, VOID, outputs["ce_point_labels"]),
        class_points.labels,
        loss.num_uncertain,
    )
    same_points(
        case,
        outputs["mask_point_logits"][..., None],
        np.asarray(mask_points.logits)[present][..., None],
        outputs["mask_point_labels"],
        np.asarray(mask_points.targets)[present],
        loss.num_uncertain,
    )
    case.check("loss_point_ce", point_ce)
    case.check("loss_mask_bce", bce)
    case.check("loss_mask_dice", dice)
    case.check("loss_point_mask", bce + dice)
    case.check("loss_seg_total", point_ce + bce + dice)


def point_loss_of(case) -> PointLoss:
    """The loss whose draws the fixture holds: their counts say how many points of which kind."""
    points = case.outputs["ce_point_labels"].shape[1]
    candidates, fresh = (case.inputs[f"draw_ce_{k}"].shape[1] for k in ("candidates", "random"))
    # half a point more than are kept by uncertainty, so that rounding down finds their number
    importance = min((points - fresh + 0.5) / points, 1.0)
    return PointLoss(
        points=points, oversample=candidates // points, importance=importance, void="negative"
    )


def same_points(case, want_logits, logits, want_labels, labels, kept):
    """The same points, where those kept by uncertainty may swap places if equally uncertain."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    case.check("fresh logits", logits[:, kept:], want=want_logits[:, kept:])
    case.check("fresh labels", labels[:, kept:], want=want_labels[:, kept:])
    case.check(
        "kept logits", np.sort(logits[:, :kept], axis=1), want=np.sort(want_logits[:, :kept], 1)
    )
    case.check(
        "kept labels", np.sort(labels[:, :kept], axis=1), want=np.sort(want_labels[:, :kept], 1)
    )
