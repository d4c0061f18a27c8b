"""What the miniature scenes can hold: 32 COCO categories, five settings, and who goes with whom."""

from dataclasses import dataclass

_NUMBERED = """
    1:person 2:bicycle 3:car 4:motorcycle 5:airplane 6:bus 7:train 8:truck 9:boat 10:traffic_light
    11:fire_hydrant 13:stop_sign 14:parking_meter 15:bench 16:bird 17:cat 18:dog 19:horse 20:sheep
    21:cow 22:elephant 23:bear 24:zebra 25:giraffe 27:backpack 28:umbrella 31:handbag 32:tie
    33:suitcase 34:frisbee 35:skis 36:snowboard 37:sports_ball 38:kite 39:baseball_bat
    40:baseball_glove 41:skateboard 42:surfboard 43:tennis_racket 44:bottle 46:wine_glass 47:cup
    48:fork 49:knife 50:spoon 51:bowl 52:banana 53:apple 54:sandwich 55:orange 56:broccoli 57:carrot
    58:hot_dog 59:pizza 60:donut 61:cake 62:chair 63:couch 64:potted_plant 65:bed 67:dining_table
    70:toilet 72:tv 73:laptop 74:mouse 75:remote 76:keyboard 77:cell_phone 78:microwave 79:oven
    80:toaster 81:sink 82:refrigerator 84:book 85:clock 86:vase 87:scissors 88:teddy_bear
    89:hair_drier 90:toothbrush
"""
COCO_IDS: dict[str, int] = {
    name.replace("_", " "): int(number) for number, name in (entry.split(":") for entry in _NUMBERED.split())
}
"""The 80 COCO category names and their official ids."""


@dataclass(frozen=True)
class Category:
    """One drawable category.

    width, height: usual size in pixels of a 64x64 scene. top, bottom: where the object's lower edge lies, as
    fractions of the height. colours: what it may be painted with, the first being the most usual.
    """

    name: str
    width: float
    height: float
    top: float
    bottom: float
    colours: tuple[str, ...]

    @property
    def coco_id(self) -> int:
        """The official COCO id."""
        return COCO_IDS[self.name]


CATEGORIES: tuple[Category, ...] = (
    Category("person", 10, 23, 0.66, 1.0, ("red", "blue", "green", "yellow", "purple")),
    Category("car", 23, 13, 0.68, 1.0, ("red", "blue", "white", "yellow", "green")),
    Category("bus", 29, 19, 0.66, 0.95, ("yellow", "red", "blue", "green")),
    Category("bicycle", 20, 14, 0.68, 1.0, ("black", "red", "blue")),
    Category("traffic light", 9, 23, 0.5, 0.8, ("black",)),
    Category("stop sign", 11, 21, 0.62, 0.9, ("red",)),
    Category("fire hydrant", 9, 13, 0.72, 1.0, ("red", "yellow")),
    Category("bench", 22, 13, 0.68, 0.98, ("brown", "green")),
    Category("dog", 17, 13, 0.72, 1.0, ("brown", "black", "white")),
    Category("cat", 13, 14, 0.66, 1.0, ("gray", "black", "yellow")),
    Category("bird", 13, 9, 0.15, 0.6, ("black", "white", "blue")),
    Category("kite", 13, 18, 0.3, 0.55, ("red", "yellow", "purple", "blue")),
    Category("sports ball", 9, 9, 0.72, 1.0, ("white", "red")),
    Category("baseball bat", 15, 15, 0.65, 1.0, ("brown",)),
    Category("boat", 25, 20, 0.5, 0.75, ("white", "red", "blue")),
    Category("surfboard", 8, 24, 0.7, 1.0, ("yellow", "blue", "pink")),
    Category("umbrella", 20, 20, 0.55, 0.95, ("red", "blue", "yellow", "purple")),
    Category("bottle", 7, 17, 0.6, 0.95, ("green", "brown", "blue")),
    Category("wine glass", 8, 16, 0.6, 0.95, ("red",)),
    Category("cup", 11, 10, 0.6, 0.95, ("white", "blue", "pink")),
    Category("bowl", 15, 9, 0.6, 0.95, ("blue", "white", "brown")),
    Category("banana", 14, 9, 0.6, 0.95, ("yellow",)),
    Category("apple", 9, 10, 0.6, 0.95, ("red", "green")),
    Category("pizza", 18, 12, 0.62, 0.98, ("yellow",)),
    Category("oven", 19, 22, 0.7, 0.9, ("black", "gray", "white")),
    Category("refrigerator", 15, 31, 0.7, 0.92, ("white", "gray")),
    Category("couch", 30, 17, 0.7, 0.95, ("brown", "blue", "red", "gray")),
    Category("potted plant", 13, 19, 0.6, 0.98, ("green",)),
    Category("tv", 22, 17, 0.45, 0.7, ("black",)),
    Category("clock", 12, 12, 0.2, 0.42, ("white", "brown")),
    Category("cell phone", 8, 13, 0.62, 0.97, ("black", "pink")),
    Category("laptop", 18, 14, 0.6, 0.95, ("gray", "black")),
)
NAMES: tuple[str, ...] = tuple(category.name for category in CATEGORIES)
INDEX: dict[str, int] = {name: number for number, name in enumerate(NAMES)}

SETTINGS: dict[str, dict[str, float]] = {
    "street": {
        "car": 5, "traffic light": 5, "person": 4, "bus": 3, "bicycle": 3, "stop sign": 3, "fire hydrant": 2.5,
        "bench": 1.2, "dog": 1.2, "umbrella": 0.8, "bird": 0.6,
    },
    "kitchen": {
        "refrigerator": 5, "oven": 4, "bottle": 4, "bowl": 3.5, "cup": 3, "apple": 3, "wine glass": 3,
        "banana": 2.5, "pizza": 2.5, "clock": 1.5, "person": 1.5, "potted plant": 0.8, "cat": 0.8,
    },
    "living room": {
        "couch": 6, "tv": 5, "potted plant": 3, "cat": 3, "laptop": 3, "clock": 3, "cell phone": 2.5,
        "cup": 2, "person": 1.5, "dog": 1.2, "wine glass": 0.8, "bottle": 0.5,
    },
    "park": {
        "dog": 4, "bench": 4, "sports ball": 4, "person": 4, "baseball bat": 3.5, "kite": 3, "bird": 2.5,
        "bicycle": 2, "umbrella": 0.6, "bottle": 0.4,
    },
    "beach": {
        "surfboard": 5, "umbrella": 5, "boat": 4, "person": 4, "kite": 3, "bird": 3, "sports ball": 1.5,
        "dog": 1.2, "bottle": 0.8,
    },
}  # fmt: skip
"""How readily each setting draws each category."""

COMPANIONS: dict[frozenset[str], float] = {
    frozenset(pair): factor
    for *pair, factor in (
        ("baseball bat", "sports ball", 3.0),
        ("baseball bat", "person", 1.8),
        ("surfboard", "person", 1.8),
        ("surfboard", "umbrella", 1.8),
        ("boat", "bird", 2.0),
        ("car", "traffic light", 2.5),
        ("stop sign", "fire hydrant", 2.5),
        ("bus", "person", 1.6),
        ("couch", "tv", 2.5),
        ("laptop", "cell phone", 2.5),
        ("laptop", "cup", 2.0),
        ("cat", "couch", 1.8),
        ("oven", "refrigerator", 2.5),
        ("bottle", "wine glass", 2.5),
        ("apple", "banana", 2.5),
        ("dog", "person", 1.8),
        ("bench", "bird", 1.6),
        ("pizza", "wine glass", 1.8),
    )
}
"""Factor by which one category's presence raises the other's odds."""
