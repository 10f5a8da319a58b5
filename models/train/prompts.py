"""The evaluation's prompts: fixed lists, and lists drawn from the captions with a fixed seed."""

import random
from collections.abc import Sequence

from models.train.pictures import COLOURS, SEED, colours_of
from models.train.sources import Emoji
from models.train.words import name

# Short sentences and the concepts that would answer them, by name; most are in no caption as they stand.
SENTENCES: dict[str, tuple[str, ...]] = {
    "a slice of pizza": ("pizza",),
    "the red heart": ("red heart",),
    "a cup of hot coffee": ("hot beverage", "teacup without handle"),
    "a koala from australia": ("koala",),
    "an ice cream for dessert": ("ice cream", "soft ice cream", "shaved ice"),
    "a birthday cake with candles": ("birthday cake",),
    "the king of animals, a lion": ("lion",),
    "a glass of red wine": ("wine glass",),
    "a yellow taxi": ("taxi",),
    "a little black cat": ("black cat",),
    "a cat with a smiling face": ("cat face", "pouting cat"),
    "an orange carrot": ("carrot",),
    "a palm tree on the beach": ("palm tree",),
    "please draw a penguin": ("penguin",),
    "a funny clown": ("clown face",),
    "the old key": ("old key",),
    "a snowflake in winter": ("snowflake",),
    "a beautiful butterfly": ("butterfly",),
    "a green apple": ("green apple",),
    "a big red apple": ("red apple",),
    "two beer mugs": ("clinking beer mugs", "beer mug"),
    "a rainbow after the rain": ("rainbow",),
    "one ripe strawberry": ("strawberry",),
    "a fire engine truck": ("fire engine",),
    "some french fries": ("french fries",),
    "a hot dog with sausage": ("hot dog",),
    "the wise owl": ("owl",),
    "a crab from the sea": ("crab",),
    "a pair of glasses": ("glasses", "sunglasses", "goggles"),
    "a bowl of noodle soup": ("steaming bowl",),
    "a christmas tree with a star": ("christmas tree",),
    "a robot": ("robot",),
    "a slice of watermelon": ("watermelon",),
    "a bicycle to ride": ("bicycle",),
    "a pink unicorn": ("unicorn",),
    "the sailing boat": ("sailboat",),
    "a wrapped gift": ("wrapped gift",),
    "a picture of a small house": ("house", "houses", "house with garden"),
    "a nice cheeseburger": ("hamburger",),
    "a toy kite": ("kite", "yo-yo"),
}

# What the contact sheet shows, eight a row: names, keywords and sentences, colours seen and unseen.
SHEET = (
    *("koala", "fox", "tiger face", "panda", "owl", "penguin", "frog", "octopus"),
    *("butterfly", "crab", "snail", "lady beetle", "whale", "unicorn", "elephant", "parrot"),
    *("sunflower", "rose", "cactus", "palm tree", "maple leaf", "mushroom", "potted plant", "tulip"),
    *("watermelon", "strawberry", "pineapple", "avocado", "carrot", "broccoli", "banana", "cherries"),
    *("a slice of pizza", "hamburger", "birthday cake", "doughnut", "hot beverage", "ice cream", "sushi", "beer mug"),
    *("the red heart", "a blue cactus", "house", "rainbow", "robot", "a red fox", "sailboat", "top hat"),
)
# What README.md shows: ten a row.
GALLERY = (
    *("koala", "fox", "tiger face", "panda", "owl", "penguin", "frog", "octopus", "butterfly", "crab"),
    *("sunflower", "rose", "cactus", "palm tree", "maple leaf", "mushroom", "whale", "unicorn", "parrot", "snail"),
    *("a slice of pizza", "hamburger", "birthday cake", "doughnut", "strawberry", "watermelon", "pineapple"),
    *("avocado", "carrot", "hot beverage", "the red heart", "rainbow", "house", "sailboat", "top hat", "robot"),
    *("christmas tree", "bicycle", "trumpet", "fire engine"),
)

BROAD = (
    "animal",
    "bird",
    "insect",
    "fruit",
    "flower",
    "tree",
    "fish",
    "dessert",
    "drink",
    "vehicle",
    "clothing",
    "game",
)


def names(kept: Sequence[Emoji]) -> list[int]:
    """The 200 concepts of the first row: every third of the kept ones."""
    return list(range(0, len(kept), 3))[:200]


def holders(keyword: str, kept: Sequence[Emoji]) -> set[int]:
    """The concepts whose captions hold the keyword."""
    return {i for i, e in enumerate(kept) if keyword in e.keywords or keyword in name(e).split() or keyword == name(e)}


def keywords(kept: Sequence[Emoji], count: int = 100) -> list[str]:
    """Keywords that at most three concepts share and that are no concept's name."""
    taken = {name(e) for e in kept}
    found = sorted({k for e in kept for k in e.keywords if k.isascii() and len(k) > 2 and k not in taken})
    few = [k for k in found if len(holders(k, kept)) <= 3]
    return sorted(random.Random(SEED).sample(few, min(count, len(few))))


def unseen_colours(kept: Sequence[Emoji], count: int = 40) -> list[tuple[int, str]]:
    """Concepts, each with a colour word that no caption puts before it; none that has a colour in its name."""
    rng = random.Random(SEED)
    words = {*COLOURS, "black", "white", "gray"}
    plain = [i for i, e in enumerate(kept) if not words & {*name(e).split(), *e.keywords}]
    chosen = sorted(rng.sample(plain, min(count, len(plain))))
    return [(i, rng.choice([c for c in COLOURS if c not in colours_of(i)])) for i in chosen]


def index_of(wanted: str, kept: Sequence[Emoji]) -> int:
    """The number of the concept called `wanted`."""
    return next(i for i, e in enumerate(kept) if name(e) == wanted)
