"""``meta.yaml`` has the form that the registry asks for, and agrees with the package."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[1]

URL = {"type": "string", "pattern": r"^https://[\w.-]+\.[a-z]+(/[\w./-]*)?$"}
TEXT = {"type": "string", "minLength": 1}
TAGS = ["benchmarking", "deep learning", "differential expression", "perturbation"]
TAGS += ["probabilistic modeling", "scRNA-seq"]
"""Some of the words that the registry knows, which takes no others."""

ENTRY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "blurb": {**TEXT, "maxLength": 100},
        "description": TEXT,
        "project_home": URL,
        "documentation_home": URL,
        "tutorials_home": URL,
        "publications": {
            "type": "array",
            "items": {"type": "string", "pattern": r"^10\.\d{4,9}/[-._;()/:A-Za-z0-9]+$"},
        },
        "install": {
            "type": "object",
            "properties": {"pypi": TEXT, "conda": {"type": "string", "pattern": "^.+::.+$"}},
            "additionalProperties": False,
            "minProperties": 1,
        },
        "primary_category": {"enum": ["scRNA-seq"]},
        "tags": {
            "type": "array",
            "items": {"enum": TAGS},
            "minItems": 1,
            "uniqueItems": True,
        },
        "license": TEXT,
        "language": {"enum": ["Python"]},
        "contact": {
            "type": "array",
            # Names of users of GitHub
            "items": {"type": "string", "pattern": "^[A-Za-z0-9](-?[A-Za-z0-9]){0,38}$"},
            "minItems": 1,
            "uniqueItems": True,
        },
        "test_command": TEXT,
        "category": {"enum": ["ecosystem"]},
    },
    # No `version`: the registry asks the package index for it.
    "additionalProperties": False,
    "required": [
        "name",
        "description",
        "project_home",
        "documentation_home",
        "install",
        "primary_category",
        "tags",
        "license",
        "language",
        "contact",
        "category",
    ],
}
"""The part of the registry's schema that this package's entry uses, in our own words.

Source: https://github.com/scverse/ecosystem-packages, `scripts/src/ecosystem_scripts/schema.json`,
with its changes of August 2026: pull requests 392 (`primary_category`, `language`, known tags) and
396 (no `version`). Look at it again before submitting.
"""


@pytest.fixture(scope="module")
def entry() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "meta.yaml").read_text())


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def flaws(entry: dict[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(ENTRY).iter_errors(entry)]


def test_the_entry_has_the_form_that_is_asked_for(entry):
    Draft202012Validator.check_schema(ENTRY)
    assert not flaws(entry)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("project_home", ""),
        ("documentation_home", "spaperb.readthedocs.io"),
        ("contact", []),
        ("contact", ["two words"]),
        ("tags", ["python"]),
        ("version", "0.2.0"),
        ("install", {}),
        ("category", "core-framework"),
        ("publications", ["https://doi.org/10.1016/j.jare.2024.10.035"]),
    ],
)
def test_flaws_are_found(entry, key, value):
    assert flaws({**entry, key: value})


@pytest.mark.parametrize("key", ENTRY["required"])
def test_what_lacks_is_found(entry, key):
    assert flaws({k: v for k, v in entry.items() if k != key})


def test_it_says_what_other_files_say(entry, pyproject):
    project = pyproject["project"]
    assert entry["install"]["pypi"] == project["name"]
    assert entry["license"] == project["license"]
    assert set(entry["tags"]) <= {*TAGS} & {*project["keywords"]}
    assert f"doi: {entry['publications'][0]}\n" in (ROOT / "CITATION.cff").read_text()


def test_its_command_names_what_there_is(entry, pyproject):
    command = entry["test_command"]
    assert set(re.findall(r"--group (\w+)", command)) <= set(pyproject["dependency-groups"])
    extras = re.findall(r"\.\[([\w,]+)\]", command)
    assert set(extras) <= set(pyproject["project"]["optional-dependencies"])
