"""A run written by hand, and what its page holds."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

from regard.evals.pope import Question
from regard.evals.run_folder import RunFolder

IMAGES = [f"{number:012d}.jpg" for number in range(8)]


def record(run, source="somewhere", recipes=("none", "vhr"), done=8):
    """A run written by hand: the second recipe says less of what is not there, and less altogether."""
    config = {
        "benchmarks": ["pope", "chair"],
        "source": source,
        "items": 8,
        "seed": 0,
        "model_name": "some/model",
        "model": {
            "class": "Llava",
            "processor": "P",
            "dtype": "float16",
            "parameters": 7_000_000,
            "sha256_of_samples": "0",
        },
        "data": {name: {"images": 8, "images_sha256": "0" * 64} for name in ("pope", "chair")},
        "prompts": {"pope": "USER: <image> {question}", "chair": "USER: <image> describe"},
        "generation": {
            name: {"max_new_tokens": 512, "do_sample": False, "num_beams": 1} for name in ("pope", "chair")
        },
        "recipes": {
            recipe: [] if recipe == "none" else [{"class": "VHR", "alpha": 2.0}] for recipe in recipes
        },
        "scoring": {"parser": "official", "words": "regard", "drop_unfinished": False},
        "versions": {"regard": "0", "torch": "0", "transformers": "0"},
        "sessions": [
            {"started": "now", "command": "regard bench", "batch_size": 1, "device": "cpu", "python": "3"}
        ],
    }
    folder = RunFolder.create(run, config)
    questions = [
        Question(n, image, "Is there a dog in the image?", "yes" if n % 2 else "no", "random")
        for n, image in enumerate(IMAGES)
    ]
    folder.write_json("data/pope.json", {"random": [asdict(q) for q in questions]})
    folder.write_json("data/chair.json", {image: ["dog", "bench"] for image in IMAGES})
    for recipe in recipes:
        common = {"recipe": recipe, "prompt": "p", "tokens": 9, "cut": False, "seconds": 0.5}
        kept = IMAGES if recipe == "none" else IMAGES[:done]
        answers = []
        for q in questions:
            answer = "Yes" if recipe == "none" else q.label.title()
            answer = "no <script>alert(1)</script>" if recipe != "none" and q.question_id == 1 else answer
            asked = {"image": q.image, "label": q.label, "split": "random", "question": q.text}
            answers.append({"id": f"random/{q.question_id}", **asked, "answer": answer, **common})
        folder.append("pope", recipe, answers)
        text = "A dog, a cat & a bench." if recipe == "none" else "A dog <b>."
        folder.append(
            "chair", recipe, [{"id": image, "image": image, "answer": text, **common} for image in kept]
        )
    folder.close()
    return folder


class Balance(HTMLParser):
    """Checks that every element is closed, and collects what the page would fetch."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "path", "use"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.ids, self.classes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset"):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "class":
                self.classes.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def parsed(text):
    page = Balance()
    page.feed(text)
    assert page.open == []
    return page


def blocks(text):
    """The data of a page by the ids of their elements."""
    found = re.findall(r'<script type="application/json" id="([^"]*)">(.*?)</script>', text, re.DOTALL)
    return {name: json.loads(part) for name, part in found}
