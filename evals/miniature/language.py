"""What is said about a scene: questions, short captions and the detailed description."""

import random
import re

from .categories import CATEGORIES, COCO_IDS, SETTINGS
from .pen import PALETTE
from .scenes import SIDE, Scene, SceneObject

POPE_PROMPT = "Is there {article} {name} in the image?"
DETAIL_PROMPT = "Please describe this image in detail."
SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
QUESTION_FORMS: tuple[str, ...] = (
    POPE_PROMPT,
    POPE_PROMPT + SHORT_SUFFIX,
    "Is there {article} {name} in this image?",
    "Is there {article} {name} in this image? Please answer yes or no.",
    "Is there {article} {name} in the image? Please answer this question with one word.",
)
"""POPE's wording alone, with LLaVA's suffix, then those of AMBER, MME and POPE's one-word variant."""
DETAIL_FORMS: tuple[str, ...] = (DETAIL_PROMPT, "Describe this image.", "Describe this image in detail.")
BRIEF_PROMPT = "What is in this image?"

_PLURALS = {
    "person": "people",
    "bus": "buses",
    "bench": "benches",
    "couch": "couches",
    "wine glass": "wine glasses",
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = ("The image shows a {}.", "This is a picture of a {}.")
_CLOSINGS: dict[str, tuple[str, ...]] = {
    "street": ("It is a normal day in the city.", "The road is wide."),
    "kitchen": ("The kitchen is used for cooking.", "The walls are covered with tiles."),
    "living room": ("The room is quiet and cozy.", "A picture hangs on the wall."),
    "park": ("There are trees in the background.", "The grass is green and fresh."),
    "beach": ("The sea is calm.", "The sun shines over the water."),
}
_EXTRA_WORDS = """
    a about above all also an and any are as at be been behind below beside between big bottom by can center
    color colour could count do does each few following for from front has have her here his how i if into
    its large left list look many maybe me more most much name near next nothing now object objects of off on
    one only or other out over photo please present provide right say see seen she show side small some
    something tell that their them then there these they thing things those to top under up user very visible
    was we were what where which while who why with you your give short long brief detailed description
    caption image picture scene yes no not none true false correct question answer word words single phrase
    zero four five six seven eight nine ten unknown sure man woman boy girl child dark light bright old new
    in front close far away food animal animals vehicle vehicles plate floor ground sky tree cloud window door
    orange teal golden silver standing sitting lying running holding riding eating outdoor indoor day night
"""


def article(phrase: str) -> str:
    """`an` before a vowel, else `a`."""
    return "an" if phrase[0] in "aeiou" else "a"


def plural(name: str) -> str:
    """The plural of a category name."""
    return _PLURALS.get(name, f"{name}s")


def question(name: str, form: str = POPE_PROMPT) -> str:
    """The yes/no question about a category."""
    return form.format(article=article(name), name=name)


def _position(item: SceneObject) -> str:
    third = item.centre[0] / SIDE
    return "on the left" if third < 0.36 else "on the right" if third > 0.64 else "in the middle"


def _groups(scene: Scene) -> list[tuple[str, str]]:
    """(noun phrase, where) for each category, largest object first."""
    groups = []
    for name in scene.categories:
        items = [item for item in scene.objects if item.category == name]
        if len(items) > 1:
            groups.append((f"{_NUMBERS.get(len(items), 'several')} {plural(name)}", ""))
            continue
        several = len(next(c.colours for c in CATEGORIES if c.name == name)) > 1
        phrase = f"{items[0].colour} {name}" if several and name != "person" else name
        phrase = f"{article(phrase)} {phrase}"
        if name == "person":
            phrase += f" in {items[0].colour}"
        groups.append((phrase, _position(items[0])))
    return groups


def describe(scene: Scene, rng: random.Random) -> str:
    """A description of several sentences that names every annotated category, largest first."""
    sentences = [rng.choice(_OPENINGS).format(scene.setting)]
    for place, (phrase, where) in enumerate(_groups(scene)):
        if not where:
            sentences.append(f"There are {phrase}.")
            continue
        form = rng.choice(("There is {} {}.", "{} can be seen {}.") if place else ("There is {} {}.",))
        sentence = form.format(phrase, where)
        sentences.append(sentence[0].upper() + sentence[1:])
    sentences.append(rng.choice(_CLOSINGS[scene.setting]))
    return " ".join(sentences)


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def brief(scene: Scene, most: int = 8) -> str:
    """One line that lists up to `most` categories and the setting."""
    parts = [phrase for phrase, _ in _groups(scene)][:most]
    if not parts:
        return f"An empty {scene.setting}."
    line = f"{_listing(parts)} in a {scene.setting}."
    return line[0].upper() + line[1:]


def references(scene: Scene) -> list[str]:
    """Five short captions in COCO's manner; none need name everything."""
    rng = random.Random(f"references/{scene.split}/{scene.seed}")
    groups = _groups(scene)
    lines = [brief(scene), brief(scene, 2)]
    while len(lines) < 5:
        some = rng.sample(groups, min(len(groups), rng.randint(1, 3)))
        if not some:
            lines.append(f"A picture of an empty {scene.setting}.")
            continue
        lines.append(f"A {scene.setting} with {_listing([phrase for phrase, _ in some])}.")
    return lines


def vocabulary() -> list[str]:
    """Every word that prompts, captions, answers and the 80 COCO names need, lower-cased and sorted."""
    texts = [*QUESTION_FORMS, *DETAIL_FORMS, BRIEF_PROMPT, *_OPENINGS, *COCO_IDS, *PALETTE, *SETTINGS]
    texts += [plural(name) for name in COCO_IDS] + [line for lines in _CLOSINGS.values() for line in lines]
    texts += ["There are several.", "can be seen", "on the left right in the middle", "An empty", "assistant"]
    texts += ["A picture of an empty", *_NUMBERS.values(), _EXTRA_WORDS, *(str(n) for n in range(21)), "s t"]
    return sorted({word for text in texts for word in re.findall(r"[a-z0-9]+", text.lower())})
