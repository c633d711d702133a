"""The quick start runs as it is written, and its prediction is good."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Fewer epochs than a reader's: the network has a tenth of the prediction.
    text = (DOCS / "quickstart.md").read_text().replace("train()", "train(max_epochs=20)")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {}
    with pytest.warns(UserWarning, match="type_0"):
        exec("\n".join(blocks), names)
    assert names["scores"].set_index("metric").loc["pearson_delta", "scaled"] > 0.8
    assert (tmp_path / "mean_change.png").exists()
