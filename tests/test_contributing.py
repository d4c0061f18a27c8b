"""The recipe that CONTRIBUTING.md adds, put where it says and tested as it says."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import regard

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
SHOWN = dict(re.findall(r'```(?:python|diff) title="([^"]+)"\n(.*?)```', TEXT, re.DOTALL))


@pytest.fixture
def boost(tmp_path, monkeypatch):
    """The class in the shown file, as `regard.interventions.boost`, with the shown lines in recipes.py."""
    name = "regard.interventions.boost"
    (tmp_path / "boost.py").write_text(SHOWN["interventions/boost.py"])
    spec = importlib.util.spec_from_file_location(name, tmp_path / "boost.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    recipes = importlib.import_module("regard.interventions.recipes")
    imported, before, line = SHOWN["interventions/recipes.py"].splitlines()
    assert before.strip() in Path(recipes.__file__).read_text()
    names = {"__package__": recipes.__package__}
    exec(imported[1:], names)
    monkeypatch.setattr(recipes, "METHODS", eval(f"({line[1:]})", names) + recipes.METHODS)
    return module.Boost


def run_shown_test():
    namespace = {}
    exec(compile(SHOWN["tests/test_boost.py"], "tests/test_boost.py", "exec"), namespace)
    namespace["test_boost_is_its_equation"]()


def test_the_shown_test_passes(boost):
    assert [recipe.summary for recipe in regard.recipes("boost")] == [boost.__doc__.splitlines()[0]]
    run_shown_test()


@pytest.mark.parametrize("coefficients", [(1.0, 1.0), (1.0, 3.0)], ids=["identity", "not renormalised"])
def test_the_shown_test_fails_for_another_recipe(boost, monkeypatch, coefficients):
    def policy(self, masses):
        return torch.tensor(coefficients).expand_as(masses)

    monkeypatch.setattr(boost, "policy", policy)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run_shown_test()
