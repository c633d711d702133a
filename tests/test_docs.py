"""The quick start runs as it is written, and the API leaves no module out."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_api_has_every_module():
    text = (DOCS / "api.md").read_text()
    modules = {path.stem for path in (ROOT / "src" / "spaperb").glob("[!_]*.py")}
    listed = set(re.findall(r"^   spaperb\.([a-z]+)$", text, re.MULTILINE))
    # Of `model` there is SpaPerbModel, on its own page.
    assert modules - listed == {"model"}


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Fewer epochs than a reader's.
    text = (DOCS / "quickstart.md").read_text().replace("train()", "train(max_epochs=20)")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="type_0"):
        exec("\n".join(blocks), names)
    assert names["scores"].set_index("metric").loc["pearson_delta", "scaled"] > 0.8
    assert (tmp_path / "mean_change.png").exists()
