"""What a person sees in generated scenes: are the words there, can the things be named?

Of the oracle's labels of each generated image (``Scenes.oracle_labels``), its prompt, its mask:

1. obedience: part of the pixels whose class the prompt names
2. recall: part of the prompt's words whose class has at least ``LEAST_SHARE`` of the picture;
   precision: part of the classes with as much that the prompt names; both of things alone, too
3. a component is an 8-connected region of one class. Of a thing class and with fewer than ``LEAST``
   pixels it is a fragment: fragments per picture (and such components of all classes). With more it
   is a thing: in how many pictures each class has exactly as many as were asked for (right counts)
4. shape: mean over things of the IoU with the best-fitting template of their class
   (``scene_fit.py``), of the image's labels and of the mask, and the part of them that reach
   ``FITTING``
5. named by shape: the first ``NAMED`` things cut out, without prompt and colour, each given the
   class whose template fits best; how often that is the class of its colour

Real renders of the validation split go through the same code: hidden things, for one, keep their
shape below 1. Level of chance: for 1-3 the prompts of other pictures, in a random cycle as that of
alignment; for 5 one guess among all things.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64, Integer, UInt8
from scipy import ndimage

from jointseg_jax import build
from jointseg_jax.config import RunConfig
from jointseg_jax.data.sources.scenes import Scenes, named
from jointseg_jax.evaluation.alignment import cycle, number
from jointseg_jax.evaluation.confusion import Confusion, shares
from jointseg_jax.evaluation.scene_fit import fit

LEAST = 10
"""Pixels of a component that counts as a thing, and not as a fragment."""

LEAST_SHARE = 0.01
"""Part of a picture that a class must cover to be seen in it."""

FITTING = 0.85
"""IoU with its template from which on a thing has the shape of its word."""

NAMED = 48
"""Things that are named without their colour."""

MOST = 256
"""Pictures of a run that are measured, the first ones, and at most as many real ones."""

Images = UInt8[np.ndarray, "n height width 3"]
Masks = Integer[np.ndarray, "n height width"]


def scene_source(config: RunConfig) -> Scenes | None:
    """Returns the embedded source whose pictures a run makes and its judge knows, or None."""
    spec = config.data.val
    if config.evaluate.judge != "oracle" or build.SOURCES.get(spec["name"]) is not Scenes:
        return None
    source = build.records(config, "val")
    return source if isinstance(source, Scenes) else None


def pairs_scenes(
    images: Images, masks: Masks, prompts: Sequence[str], source: Scenes, seed: int
) -> dict[str, Any]:
    """Measures generated pairs (``scenes``), and at the level of chance (``scenes_chance``).

    Args:
      seed: of the cycle in which each picture gets another's prompt and mask.
    """
    report = {"scenes": measure(images, masks, prompts, source)}
    if len(images) < 2:
        return report | {"scenes_chance": {}}
    other = np.empty(len(images), int)
    order = cycle(len(images), seed)
    other[order] = np.roll(order, 1)
    judged = source.oracle_labels(images)
    seen = components(judged, len(source.classes))
    chance = agreement(judged, seen, [prompts[i] for i in other], source)
    chance["alignment_miou"] = alignment(judged, masks[other], source)
    chance["named_by_shape"] = ratio(1, len(source.things))
    return report | {"scenes_chance": chance}


def real_scenes(source: Scenes, count: int, *, pairs: bool = True) -> dict[str, Any]:
    """Measures the first real renders of a source, at its own size (``scenes_real``).

    Args:
      pairs: whether masks and prompts are looked at, too.
    """
    records = [source[i] for i in range(min(count, MOST, len(source)))]
    images, labels = (np.stack([record[k] for record in records]) for k in ("image", "labels"))
    prompts = [record["captions"][0] for record in records]
    given = (labels, prompts) if pairs else (None, None)
    return {"scenes_real": measure(images, *given, source)}


def measure(
    images: Images, masks: Masks | None, prompts: Sequence[str] | None, source: Scenes
) -> dict[str, Any]:
    """Measures pictures of scenes, which may be generated or real.

    Args:
      masks: labels that belong to the images; without them their measures are left out.
      prompts: what was asked for, a caption each; likewise.
      source: whose classes are meant; its ``size`` does not matter.

    Returns:
      JSON values; None where there was nothing to measure.
    """
    judged = source.oracle_labels(images)
    seen = components(judged, len(source.classes))
    report = {"pictures": len(images)} | _counted(judged, seen, masks, prompts, source)
    shape = shape_report(seen, source)
    report |= {f"{name}_image": value for name, value in shape.items()}
    if masks is not None:
        same = np.array_equal(judged, masks)
        shape = shape if same else shape_report(components(masks, len(source.classes)), source)
        report |= {f"{name}_mask": value for name, value in shape.items()}
    return report | naming_report(seen, source)


def glance(
    images: Images, masks: Masks | None, prompts: Sequence[str] | None, source: Scenes
) -> dict[str, float]:
    """Measures pictures as ``measure`` does, in milliseconds: without fitting any shape.

    Returns:
      What there was something to measure of.
    """
    judged = source.oracle_labels(images)
    seen = components(judged, len(source.classes))
    found = _counted(judged, seen, masks, prompts, source)
    return {name: value for name, value in found.items() if value is not None}


def alignment(judged: Masks, masks: Masks, source: Scenes) -> float | None:
    """IoU of masks with the oracle's labels, as ``alignment.py`` has it."""
    confusion = Confusion(len(source.classes))
    confusion.add(judged, masks)
    return number(confusion.miou())


class Components(NamedTuple):
    """The connected regions of label maps, in the order of the maps, then of the classes."""

    numbers: Int[np.ndarray, "n height width"]  # index of each pixel's region, -1 where none
    picture: Int64[np.ndarray, " regions"]
    kind: Int64[np.ndarray, " regions"]  # class index
    area: Int64[np.ndarray, " regions"]  # pixels

    def masks(
        self, chosen: Int64[np.ndarray, " chosen"]
    ) -> Bool[np.ndarray, "chosen height width"]:
        """Cuts regions out, each in a picture of its own."""
        return self.numbers[self.picture[chosen]] == chosen[:, None, None]

    def isthing(self, source: Scenes) -> Bool[np.ndarray, " regions"]:
        """Marks the regions whose class is a thing."""
        return np.array(source.classes.isthing)[self.kind]

    def things(self, source: Scenes) -> Int64[np.ndarray, " things"]:
        """Lists the regions that count as things."""
        return np.flatnonzero(self.isthing(source) & (self.area >= LEAST))


def components(labels: Masks, classes: int) -> Components:
    """Finds the 8-connected regions of each class; VOID is in none."""
    plane = np.zeros((3, 3, 3), bool)
    plane[1] = True  # neighbours within a map, corners included
    numbers = np.full(labels.shape, -1)
    picture, kind, total = [], [], 0
    for index in range(classes):
        regions, count = ndimage.label(labels == index, plane)
        inside = regions > 0
        numbers[inside] = total + regions[inside] - 1
        # regions are counted in raster order; the first pixel of each says whose map it is
        _, first = np.unique(regions[inside], return_index=True)
        picture.append(np.nonzero(inside)[0][first])
        kind.append(np.full(count, index))
        total += count
    picture, kind = np.concatenate(picture), np.concatenate(kind)
    order = np.lexsort((kind, picture))
    rank = np.append(np.argsort(order), -1)  # the last one is that of -1
    area = np.bincount(numbers[numbers >= 0], minlength=total)
    return Components(rank[numbers], picture[order], kind[order], area[order])


def agreement(
    judged: Masks, seen: Components, prompts: Sequence[str], source: Scenes
) -> dict[str, float | None]:
    """Compares what is in pictures with what their prompts name."""
    classes = source.classes
    isthing = np.array(classes.isthing)
    words = [named(prompt) for prompt in prompts]
    asked = np.array([[w.get(name, 0) for name in classes.names] for w in words])  # [n, classes]
    covered = shares(judged, len(classes))[:, :-1]
    visible = covered >= LEAST_SHARE
    both = visible & (asked > 0)
    found, things = np.zeros_like(asked), seen.things(source)
    np.add.at(found, (seen.picture[things], seen.kind[things]), 1)
    right = (found == asked)[:, isthing].all(1)
    return {
        "obedience": ratio(covered[asked > 0].sum(), len(judged)),
        "recall": ratio(both.sum(), (asked > 0).sum()),
        "precision": ratio(both.sum(), visible.sum()),
        "recall_things": ratio(both[:, isthing].sum(), (asked > 0)[:, isthing].sum()),
        "precision_things": ratio(both[:, isthing].sum(), visible[:, isthing].sum()),
        "right_counts": ratio(right.sum(), len(judged)),
    }


def _counted(
    judged: Masks,
    seen: Components,
    masks: Masks | None,
    prompts: Sequence[str] | None,
    source: Scenes,
) -> dict[str, Any]:
    """What is found by counting pixels and regions alone."""
    report: dict[str, Any] = {}
    if masks is not None:
        report["alignment_miou"] = alignment(judged, masks, source)
    if prompts is not None:
        report |= agreement(judged, seen, prompts, source)
    small = seen.area < LEAST
    report["fragments"] = ratio(np.count_nonzero(small & seen.isthing(source)), len(judged))
    report["fragments_all"] = ratio(np.count_nonzero(small), len(judged))
    return report


def shape_report(seen: Components, source: Scenes) -> dict[str, Any]:
    """Compares each thing with the templates of its class."""
    things, names = seen.things(source), source.classes.names
    fits = np.zeros(len(things), np.float32)
    for kind in np.unique(seen.kind[things]):
        mine = seen.kind[things] == kind
        fits[mine] = fit(seen.masks(things[mine]), names[kind])
    per_class = {
        name: ratio(fits[seen.kind[things] == names.index(name)].sum(), count)
        for name in source.things
        for count in [np.count_nonzero(seen.kind[things] == names.index(name))]
    }
    return {
        "things": len(things),
        "shape": ratio(fits.sum(), len(things)),
        "fitting": ratio(np.count_nonzero(fits >= FITTING), len(things)),
        "shape_per_class": per_class,
    }


def naming_report(seen: Components, source: Scenes) -> dict[str, Any]:
    """Names the first things by their shape alone, and compares with the class of their colour."""
    things, names = seen.things(source)[:NAMED], source.classes.names
    regions = seen.masks(things)
    fits = [fit(regions, name) for name in source.things]
    guessed = np.array([names.index(name) for name in source.things])[np.argmax(fits, axis=0)]
    right = np.count_nonzero(guessed == seen.kind[things])
    return {"named_by_shape": ratio(right, len(things)), "named": len(things)}


def ratio(part: int | np.number, whole: int | np.number) -> float | None:
    """A rounded quotient for JSON; None where the whole is nothing."""
    return number(float(part) / float(whole)) if whole else None
