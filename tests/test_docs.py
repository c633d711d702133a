"""The quick start runs as it is written, and its prediction is good."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "quickstart.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)
    assert names["scores"].set_index("metric").loc["pearson_delta", "scaled"] > 0.5
    assert (tmp_path / "mean_change.png").exists()
