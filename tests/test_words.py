"""The words of captions: the table, the tokenizer, the reductions, and how close the offline one comes."""

import builtins
import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from regard.evals.chair import chair_objects
from regard.evals.chair import words as w
from regard.evals.chair.pieces import Memo, lower


def test_the_table_says_what_the_published_list_says(shared_data: Path) -> None:
    published: dict[str, str] = {}
    for line in (shared_data / "chair" / "synonyms.txt").read_text().strip().split("\n"):
        listed = line.strip().split(", ")
        published.update(dict.fromkeys(listed, listed[0]))
    never_matched = {" motor bike", " cheesecake", "iPhone", "stove top oven", "bow tie"}
    assert w.node_words() == {k: v for k, v in published.items() if k not in never_matched}
    assert len(set(w.node_words().values())) == 80
    assert len(w.pairs()) == 54  # 55 with "stove top oven", three words that two can never be


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Two dogs, and a cat.", ["two", "dogs", ",", "and", "a", "cat", "."]),
        ("The dog's bowl isn't full", ["the", "dog", "'s", "bowl", "is", "n't", "full"]),
        ("a T-shirt and/or 3.5 hot-dogs...", ["a", "t-shirt", "and/or", "3.5", "hot-dogs", "..."]),
        ('a "stop" sign (red)', ["a", '"', "stop", '"', "sign", "(", "red", ")"]),
        ("cannot; don't", ["can", "not", ";", "do", "n't"]),
        ("", []),
    ],
)
def test_tokenizer(text: str, tokens: list[str]) -> None:
    found = w.tokenize(text)
    assert [word.text for word in found] == tokens
    assert [text[word.start : word.end].lower() for word in found] == tokens


@pytest.mark.parametrize("name", ["regard", "wordnet"])
@pytest.mark.parametrize(
    ("caption", "nodes"),
    [
        ("Two dogs and three children ride bikes", ["dog", "person", "bicycle"]),
        ("knives, mice and sandwiches on benches", ["knife", "mouse", "sandwich", "bench"]),
        ("A hot dog on a dining table", ["hot dog", "dining table"]),
        ("two motor bikes", []),  # joined, and then not in the list
        ("a stove top oven", ["oven", "oven"]),
        ("two men and a woman", ["person"]),  # WordNet leaves "men" alone
        ("people seated at tables", ["person", "chair", "dining table"]),
        ("a bow tie", ["tie"]),
        ("a baby elephant and an adult zebra", ["elephant", "zebra"]),
        ("a passenger train on the train tracks", ["train"]),
        ("wine glasses and a glass", ["wine glass"]),
        ("a toilet with its seat up and a seat", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("an orange wall", ["orange"]),
        ("a street sign", []),
        ("traffic lights and street lights", ["traffic light", "traffic light"]),
        ("", []),
    ],
)
def test_objects_of_phrases(caption: str, nodes: list[str], name: str, request: Any) -> None:
    if name == "wordnet":
        request.getfixturevalue("nltk_here")
    assert [mention.node for mention in chair_objects(caption, name)] == nodes


@pytest.mark.parametrize(
    ("caption", "nodes"),
    [
        ("a bus and two buses", ["bus"]),
        ("two men, people and women", ["person", "person", "person"]),
        ("a tennis racket", ["tennis racket"]),
        ("two ties and a tie", ["tie"]),
        ("a wine glass and wine glasses", ["wine glass", "wine glass"]),
        ("sports balls", ["sports ball"]),
        ("people seated, skiing", ["person"]),
        ("skis and scissors", ["skis", "scissors"]),
    ],
)
def test_objects_of_phrases_with_pattern(caption: str, nodes: list[str]) -> None:
    assert [mention.node for mention in chair_objects(caption, "pattern")] == nodes


@pytest.mark.parametrize("name", ["regard", "wordnet", "pattern"])
def test_mentions_point_into_the_caption(name: str, request: Any) -> None:
    if name == "wordnet":
        request.getfixturevalue("nltk_here")
    caption = 'İ saw "Two  Hot\nDogs" near a Cat\'s "TV".'
    found = chair_objects(caption, name)
    assert [caption[m.start : m.end] for m in found] == ["Hot\nDogs", "Cat", "TV"]
    assert [m.position for m in found] == [4, 9, 12]
    assert [m.word for m in found] == ["hot dog", "cat", "tv"]


def test_the_offline_nouns_are_those_of_wordnet(nltk_here: Any) -> None:
    from nltk.stem import WordNetLemmatizer

    nouns, _ = w._forms()
    lemma = WordNetLemmatizer().lemmatize
    node = w.node_words().get
    differ = {form for form, word in nouns.items() if node(word) != node(lemma(form, "n"))}
    # Two that nobody writes, and verbs, which WordNet reduces as such.
    assert differ == {"childrens", "skises", "born", "sank", "sunk"}


# What the shortcuts of tagging.py must leave to NLTK, or get right: quotes, closers, dots, contractions, odd blanks.
ODD = [
    *(
        '"',
        "''",
        "``",
        "...",
        ".",
        "?!",
        ",,",
        "--",
        ")",
        "]",
        "(",
        "\u2019",
        "\u201c",
        "\u2014",
        "&",
        "x.",
        "\u200b",
    ),
    *(
        "dr.",
        "st.",
        "u.s.",
        "a.m.",
        "etc.",
        "no.",
        "3.5",
        "1,000",
        "2013.",
        "1980s.",
        "gonna",
        "wanna",
        "cannot",
    ),
    *(
        "'tis",
        "can't",
        "dogs'",
        "'cats'",
        '"cars"',
        '"skis."',
        "(cars).",
        "chairs.)",
        'buses?"',
        "hot-dogs.",
        "#1",
    ),
    *(
        "wine glasses",
        "motor bike",
        "toilet",
        "seats",
        "ties",
        "biking",
        "seated",
        "men",
        "mice",
        "left.",
        "*trains*",
    ),
]
BLANKS = [*[" "] * 12, "  ", "\n", "\n\n", "\t", "\r\n", "\x0b", "\x1c", "\x85", "\xa0", "\u2003", ""]


def _odd_captions(real: list[str], count: int) -> list[str]:
    rng = random.Random(0)
    plain = [piece for caption in real for piece in caption.split()]
    captions = []
    for _ in range(count):
        odd = rng.random() / 2
        pieces = [rng.choice(ODD if rng.random() < odd else plain) for _ in range(rng.randint(1, 14))]
        start = rng.choice(["", "", " ", "\n", '"'])
        captions.append(start + "".join(piece + rng.choice(BLANKS) for piece in pieces))
    return captions


class PlainPipeline:
    """The published way: every token tagged and lemmatized, pairs joined, then looked up."""

    def __init__(self) -> None:
        from nltk import word_tokenize
        from nltk.stem import WordNetLemmatizer
        from nltk.tag import PerceptronTagger

        self.tokenize, self.tag = word_tokenize, PerceptronTagger().tag
        self.lemma = functools.cache(WordNetLemmatizer().lemmatize)

    def __call__(self, caption: str) -> tuple[int, list[tuple[str, str, int]]]:
        """Tokens after pairs are joined, and word, category and position of each mention."""
        parts = {"J": "a", "V": "v", "R": "r"}
        tagged = self.tag(self.tokenize(lower(caption)))
        lemmas = [self.lemma(word, parts.get(tag[0], "n")) for word, tag in tagged]
        merged, i = [], 0
        while i < len(lemmas):
            pair = w.pairs().get((lemmas[i], lemmas[i + 1])) if i + 1 < len(lemmas) else None
            merged.append((pair or lemmas[i], i))
            i += 2 if pair else 1
        skipped = {"seat"} if {"toilet", "seat"} <= {word for word, _ in merged} else set()
        nodes = w.node_words()
        found = [(word, nodes[word], i) for word, i in merged if word in nodes and word not in skipped]
        return len(merged), found


@pytest.fixture(scope="module")
def real_captions(shared_data: Path) -> list[str]:
    captions = []
    for folder in ("opera", "less_is_more", "pope_captions"):
        for file in sorted((shared_data / "outputs" / folder).iterdir()):
            rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
            captions += [row.get("caption") or row.get("text") for row in rows if "image_id" in row][::16]
    return [caption for caption in captions if caption]


def test_wordnet_words_are_those_of_the_plain_pipeline(nltk_here: Any, real_captions: list[str]) -> None:
    plain = PlainPipeline()
    assert len(real_captions) > 700
    closers = [
        'two dogs. " a cat',
        "two dogs! '' a cat",
        "two dogs. ) a cat",
        'two dogs. " )',
        "dogs.; two  cats ",
    ]
    for caption in [*real_captions, *closers, *_odd_captions(real_captions, 1500)]:
        mentions = chair_objects(caption, "wordnet")
        found = [(m.word, m.node, m.position) for m in mentions]
        length = w.merge_pairs(w.chair_words("wordnet").reduce(caption)).tokens
        assert (length, found) == plain(caption), caption
        _, chunks = w._nltk_words()._split(lower(caption))
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert tokens == plain.tokenize(lower(caption)), caption
        marked = [lower(caption)[m.start : m.end] for m in mentions]
        for text, mention in zip(marked, mentions, strict=True):
            assert text.split()[0] == tokens[mention.position], caption


def test_a_tie_of_tags_is_nltks_to_break(nltk_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = w._nltk_words()
    model = ours._tagger.model
    labels = sorted(model.classes)
    monkeypatch.setattr(model, "weights", {"bias": dict.fromkeys(labels, 1.0)})
    monkeypatch.setattr(ours, "_weights", Memo(ours._feature_weights))
    assert ours._predict(["two", "of", "zorbs", "near", "it"], "IN", "CD") == labels[-1]


@pytest.mark.parametrize("name", ["regard", "pattern"])
def test_pieces_are_tokenized_as_the_whole(name: str, real_captions: list[str]) -> None:
    for caption in [*real_captions, *_odd_captions(real_captions, 1500)]:
        tokens = w.tokenize(caption)
        reduced = w.chair_words(name).reduce(caption)
        assert reduced.tokens == len(tokens), caption
        for word in reduced.words:
            assert tokens[word.position][1:] == word[1:], caption


def test_memory_of_pieces_is_bounded() -> None:
    made = []
    memo: Memo[str, int] = Memo(lambda text: made.append(text) or len(text), most=2)
    assert [memo[text] for text in ("a", "bb", "a", "ccc", "bb")] == [1, 2, 1, 3, 2]
    assert made == ["a", "bb", "ccc", "bb"]
    assert len(memo) == 2


def test_choice() -> None:
    assert w.chair_words("regard").name == "regard"
    assert w.chair_words(w.chair_words("regard")).name == "regard"
    with pytest.raises(ValueError, match="unknown CHAIR words 'spacy', choose one of"):
        w.chair_words("spacy")


def test_without_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "nltk":
            raise ImportError("no nltk")
        return real(name, *args, **kwargs)

    w._nltk_ready.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert not w.wordnet_available()
    assert w.chair_words().name == "regard"
    with pytest.raises(ImportError, match=r"pip install 'regard\[nltk\]'"):
        w.chair_words("wordnet")


def test_without_nltk_data(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    w._nltk_ready.cache_clear()
    monkeypatch.setattr(nltk.data, "path", [])
    assert w.chair_words().name == "regard"
    with pytest.raises(
        LookupError, match=r"nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet"
    ):
        w.chair_words("wordnet")
    w._nltk_ready.cache_clear()
