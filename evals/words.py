"""The words of a caption, reduced and joined the way CHAIR matches them, in three configurations.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018, arXiv 1809.02156. The published scorers
agree on the list of words and on the pairs that are one word ("hot dog"), but not on how a word is reduced to
its singular: LisaAnne/Hallucination 6e4d33c4 and Maxlinn/CHAIR-metric-standalone 640c5071 singularize with
pattern.en, OPERA (61426efe) and most that came later lemmatize with WordNet. Hence the names here:

- "wordnet": NLTK's tokenizer, tagger and WordNet lemmatizer, as OPERA, PAI, less-is-more and lmms-eval do;
- "regard": nearly the same results without NLTK or its data, by a table of the forms that matter, quirks
  included ("men" is no person, "seated" is a chair);
- "pattern": the older variant, the POPE paper's, by such a table too ("men" is a person, "bus" is nothing).
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Word(NamedTuple):
    """A token in its reduced form, for the characters ``start`` to ``end`` of the caption."""

    text: str
    start: int
    end: int


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(
        (Path(__file__).parent / "coco_words.json").read_text(encoding="utf-8")
    )
    return table


def _listed(text: str) -> list[str]:
    return text.split(", ") if text else []


@functools.cache
def node_words() -> dict[str, str]:
    """Every word that CHAIR counts -> the COCO category it counts as."""
    return {
        word: category
        for category, others in _table()["categories"].items()
        for word in (category, *_listed(others))
    }


@functools.cache
def pairs() -> dict[tuple[str, str], str]:
    """Neighbouring reduced words that count as one -> what they become."""
    table = _table()["pairs"]
    merged = {pair: pair for pair in _listed(table["themselves"])}
    merged |= {
        f"{age} {animal}": animal for age in ("baby", "adult") for animal in _listed(table["young and grown"])
    }
    merged |= table["others"]
    result = {}
    for pair, word in merged.items():
        first, second = pair.split(" ")
        result[first, second] = word
    return result


def merge_pairs(words: Sequence[Word]) -> list[Word]:
    """Join double words, from left to right."""
    merged: list[Word] = []
    i = 0
    while i < len(words):
        pair = (words[i].text, words[i + 1].text) if i + 1 < len(words) else ("", "")
        if pair in pairs():
            merged.append(Word(pairs()[pair], words[i].start, words[i + 1].end))
            i += 2
        else:
            merged.append(words[i])
            i += 1
    return merged


def lower(text: str) -> str:
    """Lower case of the same length, so that positions hold (a few letters, as the Turkish I, would grow)."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


# ----------------------------------------------------------------------------------------- "regard": no data

# Treebank's conventions: clitics and punctuation stand alone; a hyphen, slash or dot inside a word does not part
# it. And Punkt's, on lower case: an abbreviation or a number keeps its dot unless it ends the text.
_TOKEN = re.compile(
    r"""
    \.{2,} | --+ | can(?=not\b) | n't\b | '(?:s|re|ve|ll|d|m)\b
  | \b (?:st|mt|dr|mr|mrs|ms|vs|\d[\d,:.]*|(?:[a-z]\.)+[a-z]) \. (?=\s+\S)
  | (?: (?!n't\b) [^\s.,;:!?()\[\]{}<>"\u201c\u201d'\u2019`@\#$%&*]
      | (?<=\w)\.(?=\w) | (?<=\w)[,:](?=\d) | (?<=\w)'(?=\w{3}) )+
  | \S""",
    re.VERBOSE,
)

# After one of these an -ing form is a noun ("the thrill of his skiing"), which the published tagger leaves as
# it is.
_BEFORE_NOUN = {
    *("a", "an", "the", "this", "his", "her", "its", "my", "our", "their", "your", "'s", "own", "no", "more"),
    *("ample", "extra", "for", "wooden", "black", "blue", "red", "downhill", "freestyle"),
}
_ADJECTIVE = re.compile(r"\w+(?:al|ive|able|ar|ous|ful|ra)")


def tokenize(caption: str) -> list[Word]:
    """Lower-case tokens of a caption and where they stand in it."""
    return [Word(m.group(), m.start(), m.end()) for m in _TOKEN.finditer(lower(caption))]


def _plural(word: str) -> str:
    if word.endswith("man"):
        return word[:-3] + "men"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(?:s|x|z|ch|sh)$", word) else "s")


def _verb_forms(verb: str) -> tuple[str, str]:
    """The regular -ing and -ed form."""
    if verb.endswith("ie"):
        return verb[:-2] + "ying", verb + "d"
    if verb.endswith("e"):
        return verb[:-1] + "ing", verb + "d"
    stem = verb + verb[-1] if verb in ("cup", "ship") else verb
    return stem + "ing", stem + "ed"


@functools.cache
def _forms() -> tuple[dict[str, str], dict[str, str]]:
    """Inflected noun -> reduced form, and inflected verb -> reduced form, for the words that CHAIR knows."""
    forms = _table()["forms"]
    known = {part for word in node_words() for part in word.split(" ")} | {
        w for pair in pairs() for w in pair
    }
    nouns = {_plural(word): word for word in sorted(known)}
    nouns |= {word: word for word in known} | forms["irregular"]
    nouns |= {word: word for word in _listed(forms["left alone"])}
    verbs = {form: verb for verb in _listed(forms["verbs"]) for form in _verb_forms(verb)}
    return nouns, verbs


def _reduce_by_table(caption: str) -> list[Word]:
    nouns, verbs = _forms()
    words = tokenize(caption)
    reduced = []
    for i, word in enumerate(words):
        text = nouns.get(word.text, word.text)
        if word.text in verbs:
            before = words[i - 1].text if i else ""
            noun = word.text.endswith("ing") and (before in _BEFORE_NOUN or _ADJECTIVE.fullmatch(before))
            text = word.text if noun else verbs[word.text]
        reduced.append(word._replace(text=text))
    return reduced


# ---------------------------------------------------------------------------------- "pattern": no data either


@functools.cache
def _singulars() -> dict[str, str]:
    """What pattern.en's ``singularize`` makes of the forms that CHAIR knows."""
    forms = _table()["forms"]
    known = {part for word in node_words() for part in word.split(" ")} | {
        w for pair in pairs() for w in pair
    }
    singulars = {_plural(word): word for word in sorted(known)} | {word: word for word in known}
    return singulars | forms["irregular"] | forms["singularize"]


def _reduce_by_pattern(caption: str) -> list[Word]:
    singulars = _singulars()
    return [word._replace(text=singulars.get(word.text, word.text)) for word in tokenize(caption)]


# -------------------------------------------------------------------------------------------- "wordnet": NLTK

_NLTK_DATA = {
    "punkt_tab": "tokenizers/punkt_tab/english/",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng/",
    "wordnet": "corpora/wordnet",
}


def _nltk(needed: Iterable[str]) -> Any:
    """The nltk package, once the named data are known to be there."""
    try:
        import nltk
    except ImportError as error:
        raise ImportError(
            "these CHAIR words need nltk: pip install 'regard[nltk]', or choose words='regard' without it"
        ) from error
    missing = []
    for name in needed:
        for path in (_NLTK_DATA[name], _NLTK_DATA[name].rstrip("/") + ".zip"):
            try:
                nltk.data.find(path)
                break
            except LookupError:
                continue
        else:
            missing.append(name)
    if missing:
        raise LookupError(
            f"nltk has no data named {', '.join(missing)}: run python -m nltk.downloader {' '.join(missing)}, or "
            "point NLTK_DATA to a folder that has them, or choose words='regard' without it"
        )
    return nltk


@functools.cache
def _nltk_ready() -> Any:
    return _nltk(_NLTK_DATA)


def wordnet_available() -> bool:
    """Whether nltk and its data are installed, so that ``words="wordnet"`` works."""
    try:
        _nltk_ready()
    except (ImportError, LookupError):
        return False
    return True


def _aligned(text: str, tokens: Iterable[str]) -> list[Word]:
    """Where nltk's tokens stand in the text; it rewrites double quotes, and these count as what they were."""
    words, at = [], 0
    for token in tokens:
        found, length = text.find(token, at), len(token)
        if token in ("``", "''"):
            quote = text.find('"', at)
            if quote >= 0 and (found < 0 or quote < found):
                found, length = quote, 1
        start = found if found >= 0 else at
        at = start + length if found >= 0 else at
        words.append(Word(token, start, at))
    return words


@functools.cache
def _lemma(word: str, part: str) -> str:
    from nltk.stem import WordNetLemmatizer

    lemma: str = WordNetLemmatizer().lemmatize(word, part)
    return lemma


@functools.lru_cache(maxsize=4096)
def _wordnet_cached(caption: str) -> tuple[Word, ...]:
    nltk = _nltk_ready()
    text = lower(caption)
    words = _aligned(text, nltk.word_tokenize(text))
    tags = nltk.pos_tag([word.text for word in words])
    parts = {"J": "a", "V": "v", "R": "r"}
    return tuple(
        word._replace(text=_lemma(word.text, parts.get(tag[:1], "n")))
        for word, (_, tag) in zip(words, tags, strict=True)
    )


def _reduce_by_wordnet(caption: str) -> list[Word]:
    return list(_wordnet_cached(caption))


# --------------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class ChairWords:
    """A way to reduce a caption's tokens; ``reduce`` gives them in order, before pairs are joined."""

    name: str
    reduce: Callable[[str], list[Word]]


_CHOICES = {"regard": _reduce_by_table, "wordnet": _reduce_by_wordnet, "pattern": _reduce_by_pattern}


def chair_words(name: str | ChairWords | None = None) -> ChairWords:
    """A configuration by name; None takes "wordnet" where nltk and its data are installed, else "regard".

    Raises:
        ValueError: unknown name.
        ImportError, LookupError: the configuration needs nltk or its data, which are not here.
    """
    if isinstance(name, ChairWords):
        return name
    if name is None:
        name = "wordnet" if wordnet_available() else "regard"
    if name not in _CHOICES:
        raise ValueError(f"unknown CHAIR words {name!r}, choose one of {', '.join(_CHOICES)}")
    if name == "wordnet":
        _nltk_ready()
    return ChairWords(name, _CHOICES[name])
