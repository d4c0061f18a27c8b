"""The nouns of a description, read the way AMBER does, and how alike two nouns are.

Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation", arXiv 2311.07397.
Reference: https://github.com/junyangwang0410/AMBER/blob/534babf6/inference.py

A noun counts when it is one of the words of `relation.json` (418 in the published file). Two ways to find them:

- "official": NLTK's tokenizer and tagger on the text as it stands, every tag NN*, WordNet's lemma of a noun;
- "regard": the same forms by a table that is made from the listed words when they are loaded, without NLTK or its
  data. It has no tagger: a listed word counts unless what stands beside it makes it a verb or a modifier.

On 3,000 captions of six models (COCO images; 21,539 nouns by the official way) "regard" finds all of those nouns and
2.7 % more: words that the tagger takes for adjectives or verbs, most of them by mistake ("a couch,", "two sheep
grazing", "a trash can"). 84 % of the captions have the very same nouns. Both keep the quirks of the reference: case
matters ("TV" counts, "Dogs" at the start of a sentence does not), and forms that WordNet reduces to a word that is
not listed are lost ("leaves", "men", "sunglasses", "earrings", "slippers", "chopsticks", "vases").
"""

import difflib
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ..chair.words import _nltk_ready, _plural, tokenize, wordnet_available

NOUNS = ("official", "regard")
SPACY_MODEL = "en_core_web_lg"

Similarity: TypeAlias = Callable[[str, str], float]
"""How alike two nouns are, at most 1."""


class Noun(NamedTuple):
    """A listed word that a caption names with its characters ``start`` to ``end``."""

    text: str
    start: int
    end: int


# ------------------------------------------------------------------------------------------ "regard": no data

# Plurals that spelling alone does not tell.
_IRREGULAR = {
    "bookshelves": "bookshelf",
    "busses": "bus",
    "children": "child",
    "geese": "goose",
    "knives": "knife",
    "mice": "mouse",
    "potatoes": "potato",
    "scarves": "scarf",
    "shelves": "shelf",
    "tomatoes": "tomato",
}
# Forms that WordNet's lemmatizer does not know, or takes for another word ("leaf", "sunglass").
_LOST = (
    "TVs bedsheets chopsticks closestools cooktops e-books earrings ebooks kiwifruits leaves men paragliders "
    "sanitizers seegulls slippers streetlamps sunglasses vases"
).split()
_ALSO_VERBS = set(
    "brush clock drink duck fish grill hose juice leave light line lock note paddle plug ring rock signal sink skate "
    "ski snack sound spray switch tape tie train watch water".split()
)
_BEFORE_VERB = set("to can could may might must shall should will would they we i you people who".split())
_BEFORE_CAN = set(
    "a the each every another one trash garbage tin soda beer metal paint spray watering".split()
)
_AFTER_ING = set("a an the attention him her his their them".split())  # "drawing attention", "painting the"


def _is_noun(word: str, before: str, after: str) -> bool:
    if word == "can":
        return before in _BEFORE_CAN
    if word == "hot":
        return False
    if word in ("drawing", "painting", "sailing"):
        return after not in _AFTER_ING
    return not (word in _ALSO_VERBS and before in _BEFORE_VERB)


@functools.lru_cache(maxsize=8)
def _forms(known: frozenset[str]) -> dict[str, str]:
    """Form -> listed word."""
    forms = {_plural(word): word for word in sorted(known)} | {word: word for word in known}
    forms |= {form: word for form, word in _IRREGULAR.items() if word in known}
    return {form: word for form, word in forms.items() if form not in _LOST}


def _read_by_table(caption: str, known: frozenset[str]) -> list[Noun]:
    forms = _forms(known)
    tokens = tokenize(caption)
    texts = ["", *(token.text for token in tokens), ""]
    found = []
    for place, token in enumerate(tokens):
        written = caption[token.start : token.end]  # tokens are in lower case
        if written in forms and _is_noun(written, texts[place], texts[place + 2]):
            found.append(Noun(forms[written], token.start, token.end))
    return found


# -------------------------------------------------------------------------------------------- "official": NLTK


def _places(text: str, tokens: Iterable[str]) -> list[tuple[int, int]]:
    """Where nltk's tokens stand in the text; it rewrites double quotes, so these are looked for as they were."""
    places, at = [], 0
    for token in tokens:
        written = [token, '"'] if token in ("``", "''") else [token]
        starts = [(text.find(form, at), len(form)) for form in written]
        start, length = min((found for found in starts if found[0] >= 0), default=(at, 0))
        at = start + length
        places.append((start, at))
    return places


@functools.cache
def _nltk_parts() -> tuple[Callable[[str], list[str]], Callable[[list[str]], list[tuple[str, str]]], Any]:
    """Tokenizer, tagger and lemmatizer, as nltk.word_tokenize and nltk.pos_tag use them; pos_tag loads its own anew."""
    nltk = _nltk_ready()
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    return (
        nltk.word_tokenize,
        nltk.tag.PerceptronTagger().tag,
        functools.cache(lambda word: lemmatize(word, "n")),
    )


@functools.lru_cache(maxsize=4096)
def _lemmas(caption: str) -> tuple[Noun, ...]:
    split, tag, lemma = _nltk_parts()
    tokens = split(caption)
    tagged = zip(tag(tokens), _places(caption, tokens), strict=True)
    return tuple(Noun(lemma(token), *place) for (token, name), place in tagged if name.startswith("NN"))


def _read_by_nltk(caption: str, known: frozenset[str]) -> list[Noun]:
    return [word for word in _lemmas(caption) if word.text in known]


# --------------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class NounReader:
    """A way to find the listed nouns of a caption: in order, with repeats, each where it stands."""

    name: str
    read: Callable[[str, frozenset[str]], list[Noun]]

    def __call__(self, caption: str, known: Iterable[str]) -> list[Noun]:
        """The listed words that the caption names."""
        return self.read(caption, frozenset(known))


def noun_reader(name: str | NounReader | None = None) -> NounReader:
    """A reader by name; None takes "official" where nltk and its data are installed, else "regard".

    Raises:
        ValueError: unknown name.
        ImportError, LookupError: "official" needs nltk or its data, which are not here.
    """
    if isinstance(name, NounReader):
        return name
    if name is None:
        name = "official" if wordnet_available() else "regard"
    if name not in NOUNS:
        raise ValueError(
            f"unknown AMBER words {name!r}, choose one of {', '.join(NOUNS)}{_near(name, NOUNS)}"
        )
    if name == "official":
        _nltk_ready()
        return NounReader(name, _read_by_nltk)
    return NounReader(name, _read_by_table)


def _near(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ----------------------------------------------------------------------------------------------- similarity


def spacy_available(model: str = SPACY_MODEL) -> bool:
    """Whether spaCy and the model are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("spacy", model))


def similarity_named(name: str | None = None) -> tuple[str, Similarity | None]:
    """A measure by name, with the name.

    Args:
        name: "exact" (only equal words are alike), "spacy" (the reference's, with the vectors of
            `en_core_web_lg`), or "spacy:MODEL" with another model's name or folder. None takes "spacy" where spaCy
            and that model are installed, else "exact".

    Returns:
        (name, measure); the measure is None for "exact".

    Raises:
        ValueError: unknown name, or a model without word vectors.
        ImportError, OSError: spaCy or its model is not here.
    """
    if name is None:
        name = "spacy" if spacy_available() else "exact"
    if name == "exact":
        return name, None
    kind, _, model = name.partition(":")
    if kind != "spacy":
        raise ValueError(
            f"unknown similarity {name!r}, choose exact, spacy or spacy:MODEL{_near(name, ['exact', 'spacy'])}"
        )
    return name, _spacy(model or SPACY_MODEL)


@functools.cache
def _spacy(model: str) -> Similarity:
    try:
        import spacy
    except ImportError as error:
        raise ImportError(
            "similarity='spacy' needs spaCy: pip install spacy, or choose similarity='exact' without it"
        ) from error
    try:
        # A word's vector is a look-up: none of these parts touches it.
        unused = ["tok2vec", "tagger", "parser", "senter", "attribute_ruler", "lemmatizer", "ner"]
        pipeline = spacy.load(model, exclude=unused)
    except OSError as error:
        raise OSError(
            f"spaCy has no model {model}: run python -m spacy download {model}, or choose similarity='exact'"
        ) from error
    if not pipeline.vocab.vectors_length:
        raise ValueError(f"spaCy's model {model} has no word vectors: AMBER uses {SPACY_MODEL}")
    read = functools.cache(pipeline.make_doc)

    @functools.cache
    def similarity(first: str, second: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a word without a vector is like nothing, as in the reference
            value = float(read(first).similarity(read(second)))
        return value if math.isfinite(value) else 0.0

    return similarity
