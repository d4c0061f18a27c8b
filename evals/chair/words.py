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
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...hooks.errors import UnknownName
from .pieces import Chunk, Memo, Reduced, Word, chunk_of, lower, placed


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


def merge_pairs(reduced: Reduced) -> Reduced:
    """Join double words, from left to right; what they become is one token at the place of its first."""
    words, merged = reduced.words, []
    joined = -1
    for i, word in enumerate(words):
        if i == joined:
            continue
        after = words[i + 1] if i + 1 < len(words) else None
        if after is not None and after.position == word.position + 1:
            pair = pairs().get((word.text, after.text))
            if pair is not None:
                word, joined = word._replace(text=pair, end=after.end), i + 1
        merged.append(word)
    return Reduced(merged, reduced.tokens - (len(words) - len(merged)))


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
    return [Word(m.group(), m.start(), m.end(), i) for i, m in enumerate(_TOKEN.finditer(lower(caption)))]


class _Tokenizer:
    """``tokenize``, with the tokens of pieces that it has met before looked up.

    No rule of the tokenizer looks past a blank, but for the dot of an abbreviation, which asks if anything follows.
    """

    def __init__(self, matters: Container[str]) -> None:
        self._inner: Memo[str, Chunk] = Memo(lambda piece: chunk_of(tokenize(piece + " x")[:-1], matters))
        self._last: Memo[str, Chunk] = Memo(lambda piece: chunk_of(tokenize(piece), matters))

    def __call__(self, caption: str) -> tuple[Reduced, list[Chunk]]:
        text = lower(caption)
        pieces = text.split()
        chunks = [self._inner[piece] for piece in pieces[:-1]]
        chunks += [self._last[piece] for piece in pieces[-1:]]
        return placed(text, pieces, chunks), chunks


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


@functools.cache
def _table_tokenizer() -> _Tokenizer:
    nouns, verbs = _forms()
    return _Tokenizer(nouns.keys() | verbs.keys())


def _reduce_by_table(caption: str) -> Reduced:
    nouns, verbs = _forms()
    reduced, chunks = _table_tokenizer()(caption)
    texts: list[str] = []
    for i, word in enumerate(reduced.words):
        text = nouns.get(word.text, word.text)
        if word.text in verbs:
            texts = texts or [token for chunk in chunks for token in chunk.tokens]
            before = texts[word.position - 1] if word.position else ""
            noun = word.text.endswith("ing") and (before in _BEFORE_NOUN or _ADJECTIVE.fullmatch(before))
            text = word.text if noun else verbs[word.text]
        reduced.words[i] = word._replace(text=text)
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


@functools.cache
def _pattern_tokenizer() -> _Tokenizer:
    return _Tokenizer(_singulars().keys())


def _reduce_by_pattern(caption: str) -> Reduced:
    reduced, _ = _pattern_tokenizer()(caption)
    words = [word._replace(text=_singulars()[word.text]) for word in reduced.words]
    return Reduced(words, reduced.tokens)


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


@functools.cache
def _nltk_words() -> Any:
    from .tagging import NltkWords

    _nltk_ready()
    return NltkWords()


def _reduce_by_wordnet(caption: str) -> Reduced:
    reduced: Reduced = _nltk_words().reduce(caption)
    return reduced


# --------------------------------------------------------------------------------------------------- choice


@dataclass(frozen=True)
class ChairWords:
    """A way to reduce a caption's tokens; ``reduce`` gives those that may matter, before pairs are joined."""

    name: str
    reduce: Callable[[str], Reduced]


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


@dataclass(frozen=True)
class ChairConfiguration:
    """How CHAIR is taken somewhere: two choices of words, which papers seldom tell and which both change figures.

    Attributes:
        words: the words that read the captions, a name for ``chair_words``.
        truth: the words that read the reference captions for the ground truth.
        used_by: publications and code whose figures it gives.
    """

    name: str
    words: str
    truth: str
    used_by: str


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        ChairConfiguration("wordnet", "wordnet", "wordnet", "less-is-more, ANTRP, lmms-eval"),
        ChairConfiguration("opera", "wordnet", "pattern", "OPERA and what is compared with its table"),
        ChairConfiguration("pope", "pattern", "pattern", "the POPE paper, LisaAnne's and Maxlinn's code"),
        ChairConfiguration(
            "regard", "regard", "regard", "no publication: close to wordnet, without downloads"
        ),
    )
}
"""The published ways to take CHAIR, and one that needs no downloads.

On one file of captions they differ by up to 3 points of CHAIR_S. "wordnet" gives the tables of Yue et al., "Less is
More" (arXiv 2402.14545) and of lmms-eval's code; "opera" 23 of the 24 figures of Huang et al., "OPERA" (arXiv
2311.17911; the other one is taken for a slip there); "pope" the table of Li et al., "POPE" (arXiv 2305.10355).
"""


def chair_configuration(name: str | None = None) -> ChairConfiguration:
    """A configuration by name; None takes "wordnet" where nltk and its data are installed, else "regard".

    Raises:
        UnknownName: no configuration has this name.
        ImportError, LookupError: the configuration needs nltk or its data, which are not here.
    """
    if name is None:
        name = "wordnet" if wordnet_available() else "regard"
    if name not in CONFIGURATIONS:
        raise UnknownName("CHAIR configuration", name, CONFIGURATIONS)
    configuration = CONFIGURATIONS[name]
    chair_words(configuration.words)
    chair_words(configuration.truth)
    return configuration
