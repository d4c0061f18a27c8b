"""AMBER's nouns: both readers, how close the offline one comes, similarity."""

import builtins
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regard.evals.amber import words as amber_words
from regard.evals.amber.words import noun_reader, similarity_named


@pytest.fixture(scope="module")
def known(shared_data: Path) -> frozenset[str]:
    relation = json.loads((shared_data / "amber" / "relation.json").read_text())
    return frozenset(relation).union(*relation.values())


@pytest.mark.parametrize("name", ["regard", "official"])
@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("Two dogs sit near a table.", ["dog", "table"]),
        ("Dogs and a TV", ["TV"]),  # the reference does not lower the case
        ("The leaves, the men and the sunglasses", []),
        ("knives, mice and potatoes on shelves", ["knife", "mouse", "potato", "shelf"]),
        ("two children, five geese and ten busses", ["child", "goose", "bus"]),
        ("There are scarves and tomatoes in the bookshelves.", ["scarf", "tomato", "bookshelf"]),
        ("The dog can be seen; they watch the train", ["dog", "train"]),
        ("There are cans on the floor.", ["can", "floor"]),
        ('He reads "the newspaper" near a "wall"', ["newspaper", "wall"]),
        ("", []),
    ],
)
def test_nouns_of_phrases(
    caption: str, nouns: list[str], name: str, known: frozenset[str], request: Any
) -> None:
    if name == "official":
        request.getfixturevalue("nltk_here")
    found = noun_reader(name)(caption, known)
    assert [word.text for word in found] == nouns
    for word in found:
        assert caption[word.start : word.end].startswith(word.text[:1])


@pytest.mark.usefixtures("nltk_here")
def test_the_offline_forms_are_those_of_wordnet(known: frozenset[str]) -> None:
    from nltk.stem import WordNetLemmatizer

    lemma = WordNetLemmatizer().lemmatize
    forms = amber_words._forms(known)
    differ = {form for form, word in forms.items() if lemma(form, "n") != word}
    # Plurals of misspelt words, and of words that have none.
    assert differ == {
        *(
            "air-conditionings",
            "baconics",
            "canns",
            "catholes",
            "chopstickses",
            "dogholes",
            "earings",
            "earringses",
        ),
        *("electrombiles", "hots", "pissoirs", "rpoes", "scoons", "showerpuffs", "slipperses", "waterfonts"),
    }
    lost = {f"{word}s" for word in known if word.isalpha() and lemma(f"{word}s", "n") == word} - set(forms)
    assert all(
        lost_form.endswith(("hs", "ss", "xs", "ys", "mans")) for lost_form in lost
    )  # nobody writes "boxs"


@pytest.mark.usefixtures("nltk_here")
def test_the_offline_nouns_of_real_captions(shared_data: Path, known: frozenset[str]) -> None:
    text = (shared_data / "outputs" / "opera" / "llava-1.5_greedy.jsonl").read_text()
    captions = [json.loads(line)["caption"] for line in text.splitlines()[:300]]
    official, ours = noun_reader("official"), noun_reader("regard")
    missed, more, total = Counter[str](), Counter[str](), 0
    for caption in captions:
        theirs, mine = (Counter(word.text for word in read(caption, known)) for read in (official, ours))
        missed += theirs - mine
        more += mine - theirs
        total += sum(theirs.values())
    assert total > 2000
    assert not missed
    assert sum(more.values()) / total < 0.035


@pytest.mark.usefixtures("nltk_here")
def test_official_is_the_default_where_nltk_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert noun_reader().name == "official"
    monkeypatch.setattr(amber_words, "wordnet_available", lambda: False)
    assert noun_reader().name == "regard"
    assert noun_reader(noun_reader("regard")).name == "regard"
    with pytest.raises(ValueError, match="choose one of official, regard"):
        noun_reader("wordnet")


def test_similarity_without_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "spacy":
            raise ImportError("no spacy")
        return real(name, *args, **kwargs)

    find = importlib.util.find_spec
    hidden = ("spacy", amber_words.SPACY_MODEL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert similarity_named() == ("exact", None)
    assert similarity_named("exact") == ("exact", None)
    with pytest.raises(ImportError, match="pip install spacy"):
        similarity_named("spacy")


def test_similarity_with_spacy(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    with pytest.raises(OSError, match="spaCy has no model no_such_model"):
        similarity_named("spacy:no_such_model")
    model = spacy.blank("en")
    model.to_disk(tmp_path / "bare")
    with pytest.raises(ValueError, match="no word vectors"):
        similarity_named(f"spacy:{tmp_path / 'bare'}")
    for word, vector in {"sofa": [3.0, 4.0], "couch": [4.0, 3.0], "dog": [-4.0, 3.0]}.items():
        model.vocab.set_vector(word, np.array(vector, dtype=np.float32))
    model.to_disk(tmp_path / "small")
    name, alike = similarity_named(f"spacy:{tmp_path / 'small'}")
    assert name == f"spacy:{tmp_path / 'small'}"
    assert alike is not None
    assert alike("sofa", "couch") == pytest.approx(24 / 25)
    assert alike("sofa", "dog") == pytest.approx(0.0, abs=1e-6)
    assert alike("cat", "cat") == 1.0  # also without a vector
    assert alike("cat", "dog") == 0.0
