"""The words of captions: the table, the tokenizer, the reductions, and how close the offline one comes."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from regard.evals import words as w
from regard.evals.chair import chair_objects


@pytest.fixture(scope="module")
def nltk_here(shared_data: Path) -> Any:
    nltk = pytest.importorskip("nltk")
    folder = str(shared_data / "nltk_data")
    nltk.data.path.insert(0, folder)
    w._nltk_ready.cache_clear()
    yield nltk
    nltk.data.path.remove(folder)
    w._nltk_ready.cache_clear()


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
