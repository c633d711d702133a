"""The command line: `spaperb demo`, `predict` and `benchmark`, thin over the public functions."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from anndata import AnnData

from spaperb import SpaPerbModel, baselines, benchmark, datasets, metrics, pl
from spaperb._files import (
    SUFFIXES,
    atomic_write,
    check_annotations,
    check_writable,
    described,
    read_cells,
    write_cells,
)
from spaperb._messages import format_list, shown
from spaperb.data import (
    MOST_LOG,
    NORMALISE_ADVICE,
    Scale,
    check_column,
    check_one_stimulus,
    expression_matrix,
    is_log_normalised,
)

LAYER = "spaperb_stimulated"


class CommandError(Exception):
    """What the user can mend; shown without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (CommandError, ValueError, OSError, FloatingPointError) as error:
        print(f"spaperb: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spaperb: interrupted; what is written already is whole", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spaperb", description="Predict stimulated cells from control cells."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="simulate cells, hide one type's response, predict it")
    demo.add_argument("--plots", type=Path, default=Path("spaperb_demo"), metavar="DIR")
    demo.set_defaults(run=run_demo)
    predict = commands.add_parser(
        "predict", help="train on the cells of an .h5ad file or .zarr store and predict them"
    )
    predict.add_argument(
        "--hide",
        metavar="TYPE",
        help="hide the stimulated cells of this type from training, and score their prediction",
    )
    predict.add_argument(
        "--batch-key", help="obs column of the batch, to pair cells within batches"
    )
    predict.add_argument(
        "--plots", type=Path, metavar="DIR", help="save a UMAP and a scatter here"
    )
    predict.set_defaults(run=run_predict)
    bench = commands.add_parser("benchmark", help="hide each context in turn, score every method")
    bench.set_defaults(run=run_benchmark)
    _add_folds(bench)
    for command in (predict, bench):
        _add_cells(command)
    for command, output in ((demo, Path("spaperb_demo/predicted.h5ad")), (predict, None)):
        _add_output(command, output)
    for command in (demo, predict, bench):
        _add_training(command)
    return parser


def _add_folds(bench: argparse.ArgumentParser) -> None:
    """Arguments of leaving contexts out."""
    bench.add_argument("--held-out", help="obs column of the contexts; default: the cell type's")
    bench.add_argument(
        "--methods",
        nargs="+",
        choices=sorted(_methods(None, None)),
        default=["spaperb_in_context", "spaperb_published", *baselines.BASELINES],
        help="methods to run; default: SpaPerb's objectives and all baselines of cell types",
    )
    bench.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    bench.add_argument(
        "--min-cells", type=_positive, default=50, help="per condition of a context"
    )
    bench.add_argument(
        "--n-jobs", type=int, default=1, help="folds to run at once; -1 for all cores"
    )
    bench.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="CSV and figures; finished folds are kept in DIR/folds and not run again",
    )


def _add_cells(command: argparse.ArgumentParser) -> None:
    """Arguments of the cells to read."""
    command.add_argument(
        "file", type=Path, metavar="FILE", help="cells by genes: an .h5ad file or .zarr store"
    )
    command.add_argument("--condition-key", default="condition", help="obs column")
    command.add_argument("--control", default="control", help="its value for control cells")
    command.add_argument(
        "--stimulated", help="its value for stimulated cells; needed if there are several"
    )
    command.add_argument("--labels-key", default="cell_type", help="obs column of the cell type")
    command.add_argument(
        "--normalize",
        action="store_true",
        help="X holds raw counts: normalise to 10,000 a cell and log1p (counts go to a layer)",
    )
    command.add_argument(
        "--n-top-genes",
        type=_positive,
        help="keep the most variable genes of training cells, by log-normalised expression",
    )


def _add_output(command: argparse.ArgumentParser, output: Path | None) -> None:
    """Arguments of the prediction and its file."""
    command.add_argument(
        "--output",
        type=_cells_path,
        default=output,
        required=output is None,
        metavar="OUT",
        help=f"file to write, .h5ad or .zarr: the cells and their prediction, layer {LAYER!r}",
    )
    command.add_argument(
        "--objective",
        choices=["in_context", "published"],
        default="in_context",
        help="the recommended model (default) or the published one",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output file")
    command.add_argument("--seed", type=int, default=0)


def _add_training(command: argparse.ArgumentParser) -> None:
    """Arguments of training."""
    command.add_argument(
        "--max-epochs",
        type=_natural,
        help="epochs at most; 0 predicts by the pretrained networks as they are",
    )
    command.add_argument(
        "--pretrained",
        type=Path,
        metavar="FILE",
        help="pretrained weights to start from; default: those that come with SpaPerb. Those "
        "saw the public data sets of its documentation, which score them too well",
    )


def run_demo(args: argparse.Namespace) -> None:
    """Hide the response of one simulated cell type, predict it, and show how close it comes."""
    print("Simulating cells (`spaperb.datasets.simulated`). These are not real cells.")
    setup = {"condition_key": "condition", "control": "control", "labels_key": "cell_type"}
    _train_and_predict(datasets.simulated(seed=args.seed), setup, "type_0", None, args)


def run_predict(args: argparse.Namespace) -> None:
    """Train on the user's cells and predict them."""
    _refuse_existing(args)
    adata, setup = _read(args)
    hide = _obs_value(adata, args.labels_key, args.hide)
    setup["batch_key"] = args.batch_key
    _train_and_predict(adata, setup, hide, args.n_top_genes, args)


def run_benchmark(args: argparse.Namespace) -> None:
    """Hide each context of the user's cells in turn and score every method."""
    adata, setup = _read(args)
    check_writable(args.output / "results.csv")
    known = _methods(args.max_epochs, args.pretrained)
    methods = {name: method for name, method in known.items() if name in args.methods}
    results = benchmark.benchmark(
        adata,
        methods,
        held_out=args.held_out or args.labels_key,
        min_cells=args.min_cells,
        n_top_genes=args.n_top_genes,
        seeds=args.seeds,
        n_jobs=args.n_jobs,
        folder=args.output / "folds",
        **setup,
    )
    table = benchmark.summary(results)
    for name, frame in (("results", results), ("summary", table)):
        with atomic_write(args.output / f"{name}.csv", overwrite=True) as path:
            frame.to_csv(path, index=False)
    for metric in ("pearson_delta", "energy_distance"):
        pl.benchmark(results, metric, save=args.output / f"{metric}.png")
    failed = results.dropna(subset="error").drop_duplicates(["context", "method", "seed"])
    for row in failed.itertuples():
        print(f"Failed: {row.method} on {row.context}, seed {row.seed}: {row.error}")
    print("Means over contexts of the median over seeds:")
    print(table.pivot(index="method", columns="metric", values="mean").round(3).to_string())
    print(f"Wrote results.csv, summary.csv and figures to {args.output}.")


def _methods(max_epochs: int | None, pretrained: Path | None) -> dict[str, benchmark.Method]:
    """All methods that the command knows, by name."""
    epochs = {"max_epochs": max_epochs}
    return {
        "spaperb_in_context": benchmark.SpaPerb(epochs, pretrained=pretrained or True),
        "spaperb_published": benchmark.SpaPerb(epochs, objective="published"),
        **baselines.BASELINES,
        "own_type_shift": baselines.OwnTypeShift(),
    }


def _read(args: argparse.Namespace) -> tuple[AnnData, dict[str, Any]]:
    """Cells of the user's file, normalised if asked, and what tells them apart."""
    adata = read_cells(args.file)
    _normalize(adata, args.normalize)
    check_column(adata, "condition_key", args.condition_key)
    setup = {
        "condition_key": args.condition_key,
        "control": _obs_value(adata, args.condition_key, args.control),
        "stimulated": _obs_value(adata, args.condition_key, args.stimulated),
        "labels_key": args.labels_key,
    }
    check_one_stimulus(adata, args.condition_key, setup["control"], setup["stimulated"])
    return adata, setup


def _train_and_predict(
    adata: AnnData,
    setup: dict[str, Any],
    hide: Any | None,
    n_top_genes: int | None,
    args: argparse.Namespace,
) -> None:
    _refuse_existing(args)
    check_writable(args.output)
    check_annotations(adata, args.output)
    if args.plots is not None:
        check_writable(args.plots / "umap.png")
    scvi.settings.seed = args.seed
    control, stimulated = _arms(adata, setup)
    hidden = np.zeros(adata.n_obs, dtype=bool)
    if hide is not None:
        hidden = stimulated & _of_type(adata, setup["labels_key"], hide, control, stimulated)
        print(f"Hiding the {hidden.sum()} stimulated cells of {hide} from all that follows.")
    train = adata[~hidden].copy()
    if n_top_genes is not None and n_top_genes < adata.n_vars:
        genes = _most_variable(train, n_top_genes)
        adata, train = adata[:, genes].copy(), train[:, genes].copy()

    SpaPerbModel.setup_anndata(train, **setup)
    model = SpaPerbModel(train, objective=args.objective, pretrained=args.pretrained or True)
    with warnings.catch_warnings():
        # The type without pairs is the one that was hidden; of others the user is told.
        hidden_alone = rf"These cell types .*: {re.escape(format_list([hide]))}\.$"
        warnings.filterwarnings("ignore", hidden_alone, UserWarning)
        model.train(max_epochs=args.max_epochs)
    try:
        model.predict_stimulated(adata, key_added=LAYER)
    except Exception as error:
        left = _leave("trained model", "_model", model.save, args.output)
        raise CommandError(f"Prediction failed: {described(error)}. {left}") from error

    adata.obs["spaperb_hidden"] = hidden
    _write(adata, args.output, args.overwrite)
    print(f"\nWrote {args.output}: layer {LAYER!r} for {adata.n_obs} cells, {adata.n_vars} genes.")

    of_type = np.ones(adata.n_obs, dtype=bool)
    if hide is not None:
        of_type = _has(adata, setup["labels_key"], hide)
        print(f"\nPrediction of the hidden stimulated cells, {hide}:")
        print(_scores(adata[control & of_type], adata[hidden], train, setup).to_string())
    else:
        print("No cell type was hidden (`--hide`), so there is nothing to score honestly.")
    if args.plots is not None:
        title = f"{hide}, hidden in training" if hide is not None else "all are training cells"
        _plot(adata[control & of_type], adata[stimulated & of_type], title, args.plots)


def _most_variable(train: AnnData, n: int) -> np.ndarray:
    """Mask of the most variable genes of training cells, by log-normalised X or raw."""
    cells = train
    if not is_log_normalised(train.X):
        raw = train.raw
        if raw is None:
            found = "there is no raw"
        elif not (raw.var_names.is_unique and train.var_names.isin(raw.var_names).all()):
            found = "raw does not have all its genes, each once"
        elif not is_log_normalised(raw.X):
            found = "raw is not log-normalised either"
        else:
            found = None
        if found is not None:
            raise CommandError(
                "--n-top-genes chooses genes by log-normalised expression. X holds other values "
                f"(negative, as after scaling, or above {MOST_LOG}), and {found}. Store "
                "log-normalised expression in X or raw, or leave --n-top-genes out and choose "
                "the genes before."
            )
        print("X is not log-normalised, so the genes are chosen by raw, which is.")
        cells = raw.to_adata()[:, train.var_names]
    chosen = sc.pp.highly_variable_genes(cells, flavor="seurat", n_top_genes=n, inplace=False)
    return chosen["highly_variable"].to_numpy()


def _write(adata: AnnData, output: Path, overwrite: bool) -> None:
    """Write the cells, or if that fails the prediction to another place."""

    def write_prediction(path: Path) -> None:
        cells, genes = (np.array(names, str) for names in (adata.obs_names, adata.var_names))
        np.savez(path, cells=cells, genes=genes, **{LAYER: adata.layers[LAYER]})

    try:
        write_cells(adata, output, overwrite=overwrite)
    except Exception as error:
        if isinstance(error, FileExistsError):
            what = f"{output} was made by another process meanwhile, and stays as it is"
        elif isinstance(error, OSError):
            what = str(error)
        else:
            what = f"{output} could not be written: {described(error)}"
        left = _leave("prediction (numpy.load reads it)", ".npz", write_prediction, output)
        raise CommandError(f"{what}. {left}") from error


def _leave(result: str, suffix: str, write: Callable[[Path], None], output: Path) -> str:
    """Write a result beside the output or in the folder of temporary files, and say where."""
    folders = [output.parent, Path(tempfile.gettempdir())]
    for folder in folders:
        path = folder / f"{output.stem}_{os.getpid()}{suffix}"
        try:
            with atomic_write(path, overwrite=False) as whole:
                write(whole)
        except OSError:
            continue
        return f"The {result} is in {path}."
    found = format_list(map(str, folders))
    return f"The {result} could not be written to {found} either, and is lost."


def _scores(
    control: AnnData, real: AnnData, train: AnnData, setup: dict[str, Any]
) -> pd.DataFrame:
    """Score the prediction beside the simplest baselines."""
    mean_shift = baselines.MeanShift().fit(train, held_out=setup["labels_key"], **setup)
    predictions = {
        "SpaPerb": control.layers[LAYER],
        "no change": baselines.NoChange().fit(train).predict(control),
        "mean shift": mean_shift.predict(control),
    }
    return pd.DataFrame(
        {
            name: {
                "pearson_delta": metrics.pearson_delta(predicted, real.X, control.X),
                "r2_mean": metrics.r2_mean(predicted, real.X),
            }
            for name, predicted in predictions.items()
        }
    ).T.round(3)


def _plot(control: AnnData, stimulated: AnnData, title: str, folder: Path) -> None:
    """Draw what can be drawn: few cells do for some plots."""
    predicted = control.layers[LAYER]
    populations = {"control": control.X, "real stimulated": stimulated.X, "predicted": predicted}
    plots: dict[str, Callable[[Path], object]] = {
        "umap.png": lambda path: pl.umap(populations, title=title, save=path),
        "mean_expression.png": lambda path: pl.mean_expression(
            predicted,
            stimulated.X,
            control.var_names,
            control=control.X,
            title=title,
            save=path,
        ),
    }
    for name, draw in plots.items():
        try:
            draw(folder / name)
        except (ValueError, RuntimeError) as error:
            print(f"{name} could not be drawn: {error}")
        else:
            print(f"Saved {folder / name}.")


def _normalize(adata: AnnData, normalize: bool) -> None:
    """Normalise counts if asked, and refuse what does not fit the request."""
    counts = Scale.of(expression_matrix(adata, None)).counts
    if counts and not normalize:
        raise CommandError(
            "X holds raw counts. Pass --normalize to normalise them here, or store normalised "
            f"expression in X: {NORMALISE_ADVICE}."
        )
    if normalize and not counts:
        raise CommandError(
            "--normalize is for raw counts, and X holds values that are not whole numbers. Leave "
            "it out if X is log-normalised already."
        )
    if normalize:
        adata.layers["counts"] = adata.X.copy()
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)


def _obs_value(adata: AnnData, key: str, text: str | None) -> Any | None:
    """Find the value that a word on the command line means: obs may hold numbers."""
    values = adata.obs[key].unique() if key in adata.obs else []
    return {str(value): value for value in values}.get(str(text), text)


def _arms(adata: AnnData, setup: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the control and of the stimulated cells."""
    control = _has(adata, setup["condition_key"], setup["control"])
    chosen = setup.get("stimulated")
    return control, (~control if chosen is None else _has(adata, setup["condition_key"], chosen))


def _has(adata: AnnData, key: str, value: Any) -> np.ndarray:
    """Mask of the cells with a value in obs; a cell without any has not."""
    return adata.obs[key].isin([value]).to_numpy()


def _of_type(
    adata: AnnData, key: str, hide: Any, control: np.ndarray, stimulated: np.ndarray
) -> np.ndarray:
    """Mask of a cell type to hide, which must have cells in both conditions."""
    check_column(adata, "labels_key", key)
    of_type = _has(adata, key, hide)
    if not (of_type & control).any() or not (of_type & stimulated).any():
        found = adata.obs[key][control | stimulated].astype(str).value_counts()
        raise CommandError(
            f"--hide {shown(hide)}: {(of_type & control).sum()} control and "
            f"{(of_type & stimulated).sum()} stimulated cells have this value in obs[{key!r}], "
            f"and both are needed. The values are: {format_list(found.index)}."
        )
    return of_type


def _refuse_existing(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.overwrite:
        raise CommandError(f"{args.output} exists. Pass --overwrite to replace it.")


def _cells_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(SUFFIXES)}, not {text!r}")
    return path


def _natural(text: str, least: int = 0) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
    return value


def _positive(text: str) -> int:
    return _natural(text, 1)
