"""CHAIR's WordNet words: the result of NLTK's tokenizer, tagger and lemmatizer, without most of their work.

OPERA (https://github.com/shikiw/OPERA/blob/61426efe/chair.py) and most scorers after it take each caption through
``word_tokenize``, ``pos_tag`` and ``WordNetLemmatizer``. The tagger, its weights, WordNet and both tokenizers are
NLTK's here too. They are asked less, in three ways that leave mentions, their places and the number of tokens as
they are:

- Sentences. Punkt decides by a word and what follows it. A plain word with a full stop, neither an abbreviation nor
  part of a known collocation, always ends a sentence, so Punkt need not be asked about it.
- Tokens. The Treebank rules do not look past a blank, but for the two ends of a sentence, so the tokens of a piece
  between blanks are looked up where it has been met before.
- Tags. A few hundred words matter to CHAIR. A token is tagged only if its part of speech decides which of them it
  becomes, and before it those tokens whose tags the tagger reads for it.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .pieces import Chunk, Memo, Reduced, Word, chunk_of, lower, placed
from .words import node_words, pairs

_INSIDE = re.compile(r"[a-z0-9]+(?:\.[a-z0-9]+)+,?")
_PLAIN = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)([,.]?)")
_PLAIN_END = re.compile(r"([a-z]+(?:-[a-z]+)*)([.?!])")
_CLOSERS = "\"')]}>\u2018\u2019\u201c\u201d\xab\xbb"
_ONLY_CLOSERS = re.compile(rf"[{re.escape(_CLOSERS)}]+")
# Blanks that Punkt, Treebank and Python do not all take for such; quotes that ask which kind of blank is beside them.
_ODD_BLANK = re.compile(r"[^\S \t\n\r\f\v]|[^\S ]['\"`]|'[^\S ]")

_PARTS = {
    "J": "a",
    "V": "v",
    "R": "r",
}  # the first letter of a tag -> WordNet's part of speech; others are nouns
_WINDOW = ("i-2", "i-1", "i", "i+1", "i+2")  # as the tagger's model names the places around a token
_TIE = 1e-6  # the tagger's weights have three decimals


def aligned(text: str, tokens: Iterable[str]) -> list[Word]:
    """Where nltk's tokens stand in the text; it rewrites double quotes, which count as what they were."""
    words: list[Word] = []
    at = 0
    for token in tokens:
        forms = ("``", "''", '"') if token in ("``", "''") else (token,)
        found = [(text.find(form, at), len(form)) for form in forms]
        start, length = min((place for place in found if place[0] >= 0), default=(at, 0))
        at = start + length
        words.append(Word(token, start, at, len(words)))
    return words


class _Form(NamedTuple):
    """What a token is reduced to: ``always``, or by its part of speech where that matters to CHAIR."""

    always: str
    choices: dict[str, str]


class _Piece(NamedTuple):
    """What stands between two blanks inside a sentence, and whether it ends one (None: Punkt has to be asked)."""

    chunk: Chunk
    ends: bool | None


class NltkWords:
    """NLTK's parts, loaded once, and a bounded memory of what they have said.

    Raises:
        ImportError, LookupError: nltk or its data are not here.
    """

    def __init__(self) -> None:
        from nltk.stem import WordNetLemmatizer
        from nltk.tag.perceptron import PerceptronTagger
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktTokenizer

        self._lemmatizer: Any = WordNetLemmatizer()
        self._tagger: Any = PerceptronTagger()
        self._treebank: Any = NLTKWordTokenizer()
        self._contractions = self._treebank.CONTRACTIONS2  # "gonna", the one kind of rule that parts letters
        self._punkt: Any = PunktTokenizer("english")
        self._abbreviations = frozenset(self._punkt._params.abbrev_types)
        self._collocated = frozenset(first for first, _ in self._punkt._params.collocations)
        self._matters = frozenset(node_words()).union(*pairs())
        self._labels: list[str] = sorted(self._tagger.model.classes)
        self._forms: Memo[str, _Form] = Memo(self._form)
        self._pieces: Memo[str, _Piece] = Memo(self._piece)
        self._edges: Memo[tuple[str, bool, bool], Chunk] = Memo(self._edge)
        self._weights: Memo[tuple[str, str | None, str | None], NDArray[np.float64]] = Memo(
            self._feature_weights
        )

    def reduce(self, caption: str) -> Reduced:
        """The words of a caption that may matter to CHAIR, in their reduced form."""
        text = lower(caption)
        pieces, chunks = self._split(text)
        words, length = placed(text, pieces, chunks)
        forms = [self._forms[word.text] for word in words]
        open_ = [word.position for word, form in zip(words, forms, strict=True) if form.choices]
        tags = self._tags([token for chunk in chunks for token in chunk.tokens], open_) if open_ else {}
        for i, form in enumerate(forms):
            part = _PARTS.get(tags[words[i].position][:1], "n") if form.choices else ""
            words[i] = words[i]._replace(text=form.choices[part] if part else form.always)
        return Reduced(words, length)

    def _form(self, text: str) -> _Form:
        lemmas = {part: self._lemmatizer.lemmatize(text, part) for part in "nvar"}
        outcomes = {lemma if lemma in self._matters else "" for lemma in lemmas.values()}
        return _Form("", lemmas) if len(outcomes) > 1 else _Form(outcomes.pop() or text, {})

    # ------------------------------------------------------------------------------- sentences and tokens

    def _ends_sentence(self, piece: str) -> bool | None:
        if not any(end in piece for end in ".?!") or _INSIDE.fullmatch(piece):
            return False
        found = _PLAIN_END.fullmatch(piece)
        if not found:
            return None
        word, end = found.groups()
        if end != ".":
            return True
        known = {word, word.split("-")[-1]} & self._abbreviations or word in self._collocated
        return None if known or len(word) == 1 else True

    def _piece(self, piece: str) -> _Piece:
        return _Piece(self._edges[piece, False, False], self._ends_sentence(piece))

    def _edge(self, key: tuple[str, bool, bool]) -> Chunk:
        """The tokens of a piece that is the first of its sentence, or the last, or both, or neither."""
        piece, first, last = key
        plain = _PLAIN.fullmatch(piece)
        if plain and not any(rule.search(f" {piece} ") for rule in self._contractions):
            word, sign = plain.groups()
            parted = sign == "," or (sign == "." and last)  # the dot of an abbreviation stays with it
            return self._chunk(piece, [word, sign] if parted else [piece])
        tokens = self._treebank.tokenize(("" if first else "x ") + piece + ("" if last else " x"))
        return self._chunk(piece, tokens[0 if first else 1 : len(tokens) - (0 if last else 1)])

    def _chunk(self, text: str, tokens: list[str]) -> Chunk:
        forms = {token: self._forms[token] for token in tokens}
        matter = {token for token, form in forms.items() if form.choices or form.always in self._matters}
        return chunk_of(aligned(text, tokens), matter)

    def _lasts(self, pieces: list[str], known: list[_Piece]) -> list[int] | None:
        """Which pieces are the last of a sentence; None: Punkt has to be asked."""
        final, lasts = len(pieces) - 1, []
        for i in [i for i, piece in enumerate(known) if piece.ends is not False]:
            if known[i].ends is None:
                return None
            if i < final:
                if pieces[i + 1][0] in _CLOSERS:  # which may belong to the sentence before
                    return None
                lasts.append(i)
        return [*lasts, final]

    def _by_punkt(self, text: str) -> tuple[list[str], list[int]]:
        """The pieces between blanks, and which of them are the last of a sentence."""
        pieces: list[str] = []
        lasts = set()
        for start, end in self._punkt.span_tokenize(text):
            pieces += text[start:end].split()
            lasts.add(len(pieces) - 1)
        return pieces, sorted(lasts)

    def _split(self, text: str) -> tuple[list[str], list[Chunk]]:
        """The pieces of a text between blanks, and what they consist of."""
        pieces = text.split()
        if not pieces:
            return [], []
        blanks = len(text) - sum(map(len, pieces))
        if blanks > text.count(" ") and _ODD_BLANK.search(text):
            return self._whole(text)
        known = [self._pieces[piece] for piece in pieces]
        lasts = self._lasts(pieces, known)
        if lasts is None:
            pieces, lasts = self._by_punkt(text)
            known = [self._pieces[piece] for piece in pieces]
        chunks = [piece.chunk for piece in known]
        first = 0
        for last in lasts:
            # The rule for a sentence's full stop looks past blanks.
            if last > first and _ONLY_CLOSERS.fullmatch(pieces[last]):
                return self._whole(text)
            chunks[last] = self._edges[pieces[last], False, True]
            chunks[first] = self._edges[pieces[first], bool(first) or not text[0].isspace(), first == last]
            first = last + 1
        return pieces, chunks

    def _whole(self, text: str) -> tuple[list[str], list[Chunk]]:
        sentences = [text[start:end] for start, end in self._punkt.span_tokenize(text)]
        return [text], [self._chunk(text, [t for s in sentences for t in self._treebank.tokenize(s)])]

    # ------------------------------------------------------------------------------------------------ tags

    def _tags(self, tokens: list[str], wanted: list[int]) -> dict[int, str]:
        """The tags of some tokens, as the tagger gives them when it goes through all."""
        before, before2 = self._tagger.START
        tags: list[str | None] = [before2, before, *map(self._tagger.tagdict.get, tokens)]
        context = [before, before2, *tokens, *self._tagger.END]
        for i in wanted:
            first = i
            while not (tags[first] and tags[first + 1]):
                first -= 1
            for k in range(first, i + 1):
                tags[k + 2] = tags[k + 2] or self._predict(context[k : k + 5], tags[k + 1], tags[k])
        return {i: str(tags[i + 2]) for i in wanted}

    def _predict(self, window: list[str], before: str | None, before2: str | None) -> str:
        """The tag of the token in the middle of five, by the sum of its features' weights."""
        weights, word = self._weights, window[2]
        scores = weights["tags", before, before2] + weights["tag", before, word]
        for place, token in zip(_WINDOW, window, strict=True):
            scores += weights[place, token, None]
        best = int(scores.argmax())
        if np.count_nonzero(scores > scores[best] - _TIE) > 1:  # nltk's order of adding may decide
            context = [self._normal(token) for token in window]
            features = self._tagger._get_features(0, word, context, before, before2)
            tag: str = self._tagger.model.predict(features)[0]
            return tag
        return self._labels[best]

    def _normal(self, token: str) -> str:
        ends = (*self._tagger.START, *self._tagger.END)
        return token if token in ends else str(self._tagger.normalize(token))

    def _feature_weights(self, key: tuple[str, str | None, str | None]) -> NDArray[np.float64]:
        """By tag, what a token or the tags before it add: sums of weights of features of the tagger's model."""
        place, one, two = key
        if place == "tags":
            features = [f"i-1 tag {one}", f"i-2 tag {two}", f"i tag+i-2 tag {one} {two}"]
        elif place == "tag":
            features = [f"i-1 tag+i word {one} {self._normal(str(two))}"]
        else:
            token = str(one)
            normal = self._normal(token)
            features = [f"{place} word {normal}"]
            if place == "i":
                features += ["bias", f"i suffix {token[-3:]}", f"i pref1 {token[0]}"]
            elif place in ("i-1", "i+1"):
                features.append(f"{place} suffix {normal[-3:]}")
        given = [self._tagger.model.weights.get(feature, {}) for feature in features]
        return np.array([sum(weights.get(label, 0.0) for weights in given) for label in self._labels])
