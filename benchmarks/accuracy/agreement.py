"""Whether the agreement of the evidence tells which genes, and which contexts, to believe.

    python benchmarks/accuracy/agreement.py FOLDER

On each data set, by pretrained networks that never saw it, without training. Each context is left
out, one third of its control cells is asked, and the change is measured in the others. Of the 200
genes with the largest predicted changes: how well `agreement`, and the width of the interval over
the change (`interval`), put the genes in the order of their relative error, and of whether the
direction is wrong (0 for chance, 1 for the best order: the area under the risk-coverage curve). Of
contexts: `group_agreement` beside `pearson_delta`, and the rank correlation of both over all
contexts but those of the screen. Writes `agreement.csv`.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from common import HERE, data_sets, make_parser, networks_without, read_set
from scipy.stats import spearmanr

from spaperb.evaluation.metrics import area_under_risk_coverage
from spaperb.evidence import Evidence, Plan, agreement, leave_out, make_episode, relate
from spaperb.module import InContextModule

N_GENES = 200
SCREEN = "crispr_multi"


def judge(evidence: Evidence, plan: Plan, module: InContextModule) -> dict[str, float]:
    """Predict a left-out change, and look what tells of its errors."""
    episode = make_episode(evidence, plan)
    perturbation = relate(evidence, plan.query, plan.kept).perturbation
    predicted = module.predict(episode.description)
    agreed, spread = agreement(episode.description, perturbation)
    top = np.argsort(-np.abs(predicted.mean), kind="stable")[:N_GENES]
    mean, true = predicted.mean[top], episode.target[top]
    width = np.sqrt(predicted.sigma**2 + episode.error**2)[top]
    unsure = {
        "agreement": -(agreed / np.maximum(spread, 1e-300))[top],
        "interval": width / np.maximum(np.abs(mean), 1e-9),
    }
    errors = {
        "relative error": np.abs(mean - true) / np.maximum(np.abs(mean), 1e-9),
        "wrong direction": (np.sign(mean) != np.sign(true)).astype(float),
    }
    return {
        "pearson_delta": np.corrcoef(predicted.mean, episode.target)[0, 1],
        "group_agreement": agreed.sum() / spread.sum(),
        **{
            f"{error}, by {by}": area_under_risk_coverage(errors[error], unsure[by])
            for error in errors
            for by in unsure
        },
    }


def main() -> None:
    """Run all data sets."""
    args = make_parser(__doc__, "folder").parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for row in data_sets().to_dict("records"):
        evidence, module = read_set(args.folder, row), networks_without(row["name"])
        for change in evidence.whole.tolist():
            plan = leave_out(evidence, change, with_context=True)
            if plan is not None:
                of = {
                    "data_set": row["name"],
                    "context": evidence.names[evidence.context[change]],
                    "perturbation": int(evidence.changes.perturbation[change]),
                }
                rows.append({**of, **judge(evidence, plan, module)})
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "agreement.csv", index=False, float_format="%.4g")
    print(table.groupby("data_set", sort=False).mean(numeric_only=True).round(3).to_string())
    others = table[table["data_set"] != SCREEN]
    print(others.groupby("data_set").mean(numeric_only=True).mean().round(3).to_string())
    found = spearmanr(others["group_agreement"], others["pearson_delta"])
    print(f"{len(others)} contexts: rank correlation {found.statistic:.2f}, p {found.pvalue:.1g}")


if __name__ == "__main__":
    main()
