"""The classes of well-known data sets, as facts: names in index order, raw file ids, things.

| table entry | index convention of its files |
|---|---|
| voc | 0 background, 1..20, 255 void |
| ade20k | file value 0 is void, file value n is class n - 1 |
| coco_panoptic | raw category ids (``COCO_PANOPTIC_IDS``), contiguous here in that order |
| coco | the 80 countable ones of those, in the same order |
| coco_stuff | category ids - 1 as in the stuffthingmaps (``COCO_STUFF_IDS``), contiguous here |
| cityscapes | train ids; ``CITYSCAPES_IDS`` are the ids in ``*_labelIds.png`` |
| celeba_mask | 0 background, then the parts in painting order, left/right as seen from the person |

Source: PASCAL VOC 2012, ADE20K scene parsing benchmark, COCO 2017 panoptic task, COCO-Stuff,
Cityscapes, CelebAMask-HQ (names as in the data sets' own tools; ADE20K things as in its panoptic
benchmark).
"""

from jointseg_jax.data.classes import Classes


# Names are kept as running text, which compares easily with the lists of the data sets' own tools.
def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


def _except(n: int, *stuff: int) -> tuple[bool, ...]:
    return tuple(i not in stuff for i in range(n))


VOC = Classes(
    names=_names(
        """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow,
        diningtable, dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""
    ),
    isthing=_except(21, 0),
)

ADE20K = Classes(
    names=_names(
        """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
        sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water,
        painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock,
        wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard,
        chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand,
        path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
        bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm,
        kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
        light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
        airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet,
        poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything,
        swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
        food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen,
        blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier,
        crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"""
    ),
    isthing=_except(
        150,
        *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54),
        *(59, 60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117),
        *(122, 128, 131, 140, 141, 145),
    ),
)

COCO = Classes(
    names=_names(
        """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
        fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
        elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis,
        snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
        tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
        orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
        dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
        toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
        toothbrush"""
    ),
    isthing=(True,) * 80,
)

# Ids of 1..90 that no category of the release has.
_COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)

COCO_IDS = tuple(i for i in range(1, 91) if i not in _COCO_GAPS)

_PANOPTIC_STUFF = _names(
    """banner, blanket, bridge, cardboard, counter, curtain, door-stuff, floor-wood, flower, fruit,
    gravel, house, light, mirror-stuff, net, pillow, platform, playingfield, railroad, river, road,
    roof, sand, sea, shelf, snow, stairs, tent, towel, wall-brick, wall-stone, wall-tile,
    wall-wood, water-other, window-blind, window-other, tree-merged, fence-merged, ceiling-merged,
    sky-other-merged, cabinet-merged, table-merged, floor-other-merged, pavement-merged,
    mountain-merged, grass-merged, dirt-merged, paper-merged, food-other-merged,
    building-other-merged, rock-merged, wall-other-merged, rug-merged"""
)

COCO_PANOPTIC = Classes(names=COCO.names + _PANOPTIC_STUFF, isthing=(True,) * 80 + (False,) * 53)

COCO_PANOPTIC_IDS = (
    *COCO_IDS,
    *(92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145),
    *(147, 148, 149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181),
    *range(184, 201),
)

COCO_STUFF = Classes(
    names=COCO.names
    + _names(
        """banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
        ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff,
        dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood,
        flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house,
        leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
        pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock,
        roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone,
        straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
        wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
        waterdrops, window-blind, window-other, wood"""
    ),
    isthing=(True,) * 80 + (False,) * 91,
)

# The stuffthingmaps hold category id - 1: things with COCO's gaps, then stuff without any.
COCO_STUFF_IDS = (*(i - 1 for i in COCO_IDS), *range(91, 182))

CITYSCAPES = Classes(
    names=_names(
        """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation,
        terrain, sky, person, rider, car, truck, bus, train, motorcycle, bicycle"""
    ),
    isthing=_except(19, *range(11)),
    palette=(
        *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153)),
        *((153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152)),
        *((70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100)),
        *((0, 80, 100), (0, 0, 230), (119, 11, 32)),
    ),
)

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

CELEBA_MASK = Classes(
    names=_names(
        """background, skin, nose, eye_g, l_eye, r_eye, l_brow, r_brow, l_ear, r_ear, mouth, u_lip,
        l_lip, hair, hat, ear_r, neck_l, neck, cloth"""
    ),
    swaps=((4, 5), (6, 7), (8, 9)),
)

CLASS_LISTS = {
    "voc": VOC,
    "ade20k": ADE20K,
    "coco_panoptic": COCO_PANOPTIC,
    "coco": COCO,
    "coco_stuff": COCO_STUFF,
    "cityscapes": CITYSCAPES,
    "celeba_mask": CELEBA_MASK,
}
"""Class list by the name that configs use."""
