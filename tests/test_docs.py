"""The quick start runs as it is written, and the API leaves no module out."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def public_modules():
    source = ROOT / "src" / "spaperb"
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not any(part.startswith("_") for part in parts):
            yield ".".join(parts)


def test_api_has_every_module():
    text = (DOCS / "api.md").read_text()
    listed = set(re.findall(r"^   spaperb\.([a-z.]+)$", text, re.MULTILINE))
    # The models have pages of their own, the modules of `evaluation` are listed instead of it,
    # and what is public of `cli` is the command.
    assert set(public_modules()) - listed == {"model", "model.tune", "evaluation", "cli"}


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


def test_a_model_of_ones_own_is_judged():
    text = (DOCS / "evaluation.md").read_text()
    (block,) = re.findall(r"^## Judge your own model\n\n```python\n(.*?)^```", text, re.M | re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    table = names["table"].set_index(["method", "metric"])["mean"]
    half, whole = (table[m] for m in ("half of the mean change", "mean_shift"))
    assert names["results"]["error"].isna().all()
    assert half["pearson_delta"] > 0.3
    # Half of the change has the direction of the whole, and not its size.
    assert half["weighted_r2_delta"] < whole["weighted_r2_delta"]
