"""Cells a second in training, against a bare PyTorch loop over the same networks, scVI, and scGen.

    python benchmarks/speed/throughput.py --scgen .venv-scgen/bin/python

The published objective with its defaults (800 hidden units, 100 latent dimensions), minibatches of
256 pairs, that is 512 cells; scVI and scGen have the same layers and 512 cells a minibatch (scGen
also its default of 128). All contestants run one after the other in each of some rounds, the first
epoch is not counted, and what counts is the ratio to the bare loop of the same round. `--variants`
runs ways to be faster instead, `--profile` tells which operations the bare loop spends its time
on. Writes `throughput.csv` (or `throughput_variants.csv`, `throughput_profile.csv`) beside this
file. `scgen-requirements.txt` is for scGen's environment, which needs this package too.
"""

import argparse
import functools
import json
import time
import unittest.mock
from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import scvi
import torch
from common import Clock, answer_of, make_cells, write
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import smooth_l1_loss

N_CELLS = 8192
N_PAIRS = 256
N_EPOCHS = 5


def train(model, **kwargs) -> float:
    """Cells a second of a scvi-tools model."""
    clock = Clock()
    model.train(
        max_epochs=1 + N_EPOCHS,
        train_size=1.0,
        enable_progress_bar=False,
        callbacks=[clock],
        **kwargs,
    )
    return N_EPOCHS * N_CELLS / clock.seconds[1:].sum()


def spaperb(adata: ad.AnnData, is_sparse: bool, **kwargs) -> float:
    """Train ours."""
    from spaperb import SpaPerbModel

    x = adata.X if is_sparse else adata.X.toarray()
    adata = ad.AnnData(x, obs=adata.obs.copy())
    SpaPerbModel.setup_anndata(adata)
    model = SpaPerbModel(adata, objective="published")
    return train(model, batch_size=N_PAIRS, early_stopping=False, **kwargs)


def bare(adata: ad.AnnData, sparse_input: bool = False, is_fused: bool = True) -> float:
    """Run the published objective in a plain loop over one tensor, dense or (at first) sparse."""
    from spaperb.module import PublishedModule

    module = PublishedModule(adata.n_vars).train()
    first = module.encoder.hidden.fc_layers[0][0]
    x = torch.from_numpy(adata.X.toarray())
    arms = (adata.obs["condition"] == "stimulated").to_numpy()
    control, stimulated = (torch.from_numpy(np.flatnonzero(arms == arm)) for arm in (False, True))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=is_fused)
    rows = adata.X if sparse_input else None
    for epoch in range(1 + N_EPOCHS):
        if epoch == 1:
            start = time.perf_counter()
        pairs = zip(
            control[torch.randperm(len(control))].split(N_PAIRS),
            stimulated[torch.randperm(len(stimulated))].split(N_PAIRS),
            strict=True,
        )
        for c, s in pairs:
            i = torch.cat([c, s])
            if rows is None:
                qz = module.encoder(x[i])
            else:
                csr = rows[i.numpy()]
                tensor = torch.sparse_csr_tensor(csr.indptr, csr.indices, csr.data, csr.shape)
                h = torch.addmm(first.bias, tensor, first.weight.T)
                hidden = module.encoder.hidden.fc_layers
                for layer in [*hidden[0][1:], *hidden[1]]:
                    h = h if layer is None else layer(h)
                scale = torch.exp(0.5 * module.encoder.log_var(h))
                qz = Normal(module.encoder.mu(h), scale)
            z_ctrl, z_stim = qz.rsample().chunk(2)
            z_delta = module.delta_encoder(torch.rand(len(c), x.shape[1]))
            px = module.decoder(z_ctrl + z_delta)
            kl = kl_divergence(qz, Normal(torch.zeros_like(qz.loc), torch.ones_like(qz.scale)))
            loss = (
                100 * smooth_l1_loss(z_delta, z_stim - z_ctrl)
                + 100 * smooth_l1_loss(px, x[s])
                + 0.5 * kl.mean()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return N_EPOCHS * N_CELLS / (time.perf_counter() - start)


def linear_layers(adata: ad.AnnData) -> float:
    """The matrix products of a step and nothing else: what a processor cannot do without."""
    from spaperb.module import PublishedModule

    module = PublishedModule(adata.n_vars)
    work = []
    for network, n_rows in (
        (module.encoder, 2 * N_PAIRS),
        (module.delta_encoder, N_PAIRS),
        (module.decoder, N_PAIRS),
    ):
        for layer in network.modules():
            if isinstance(layer, torch.nn.Linear):
                # Expression and V_delta need no gradient.
                x = torch.rand(n_rows, layer.in_features)
                x.requires_grad = layer.in_features != adata.n_vars
                work.append((layer, x, torch.rand(n_rows, layer.out_features)))
    start = time.perf_counter()
    n_steps = N_EPOCHS * N_CELLS // (2 * N_PAIRS)
    for _ in range(n_steps):
        for layer, x, gradient in work:
            layer(x).backward(gradient)
    return n_steps * 2 * N_PAIRS / (time.perf_counter() - start)


def networks_alone(adata: ad.AnnData) -> float:
    """Run the networks' passes and the optimiser alone: no dropout, draws, losses or loading."""
    from spaperb.module import PublishedModule

    module = PublishedModule(adata.n_vars, dropout_rate=0.0).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    x, v_delta = torch.rand(2 * N_PAIRS, adata.n_vars), torch.rand(N_PAIRS, adata.n_vars)
    start = time.perf_counter()
    n_steps = N_EPOCHS * N_CELLS // (2 * N_PAIRS)
    for _ in range(n_steps):
        qz = module.encoder(x)
        px = module.decoder(qz.loc[:N_PAIRS] + module.delta_encoder(v_delta))
        optimizer.zero_grad()
        torch.autograd.backward([px, qz.scale], [x[:N_PAIRS], qz.scale.detach()])
        optimizer.step()
    return n_steps * 2 * N_PAIRS / (time.perf_counter() - start)


def torch_dropout(run: Callable[[ad.AnnData], float]) -> Callable[[ad.AnnData], float]:
    """The same with PyTorch's own dropout."""

    def with_torch_dropout(adata: ad.AnnData) -> float:
        with unittest.mock.patch("spaperb.nn._cells.Dropout", torch.nn.Dropout):
            return run(adata)

    return with_torch_dropout


def profile(adata: ad.AnnData) -> pd.DataFrame:
    """Seconds that the bare loop spends in each operation itself, most first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        bare(adata)
    of = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    table = pd.Series(of, name="seconds").sort_values(ascending=False)
    table = table.rename_axis("operation").reset_index()
    return table.assign(share=table["seconds"] / table["seconds"].sum())


def scvi_model(adata: ad.AnnData) -> float:
    """Train scVI on the counts."""
    adata = adata.copy()
    scvi.model.SCVI.setup_anndata(adata, layer="counts")
    model = scvi.model.SCVI(adata, n_hidden=800, n_layers=2, n_latent=100)
    return train(model, batch_size=2 * N_PAIRS)


def scgen_model(adata: ad.AnnData, batch_size: int) -> float:
    """Train pertpy's scGen."""
    import pertpy

    adata = adata.copy()
    pertpy.tl.Scgen.setup_anndata(adata, batch_key="condition", labels_key="cell_type")
    model = pertpy.tl.Scgen(adata)
    return train(model, batch_size=batch_size)


def scgen_elsewhere(adata: ad.AnnData, python: str, batch_size: int) -> float:
    """Train scGen in its own environment."""
    return answer_of(__file__, "--only-scgen", adata.n_vars, batch_size, python=python)


def contestants(scgen: str | None) -> dict[str, Callable[[ad.AnnData], float]]:
    """What is compared."""
    of = {
        "bare loop": bare,
        "spaperb, dense": functools.partial(spaperb, is_sparse=False),
        "spaperb, CSR": functools.partial(spaperb, is_sparse=True),
        "spaperb, CSR, bfloat16": functools.partial(
            spaperb, is_sparse=True, precision="bf16-mixed"
        ),
        "scVI": scvi_model,
    }
    if scgen:
        for name, size in (("scGen", 2 * N_PAIRS), ("scGen, its default of 128 cells", 128)):
            of[name] = functools.partial(scgen_elsewhere, python=scgen, batch_size=size)
    return of


def variants() -> dict[str, Callable[[ad.AnnData], float]]:
    """Ways to be faster, of ours but for the sparse first layer."""
    not_fused = {
        "optimizer": "Custom",
        "optimizer_creator": functools.partial(torch.optim.AdamW, lr=1e-3),
    }
    ours = functools.partial(spaperb, is_sparse=True)
    return {
        "bare loop": bare,
        "spaperb, CSR": ours,
        "optimiser not fused": functools.partial(ours, plan_kwargs=not_fused),
        "bare loop, optimiser not fused": functools.partial(bare, is_fused=False),
        "PyTorch's dropout": torch_dropout(ours),
        "bare loop, PyTorch's dropout": torch_dropout(bare),
        "torch.compile": functools.partial(ours, plan_kwargs={"compile": True}),
        "bfloat16": functools.partial(ours, precision="bf16-mixed"),
        "a loader process": functools.partial(ours, datasplitter_kwargs={"num_workers": 1}),
        "sparse tensors": functools.partial(ours, load_sparse_tensor=True),
        "networks and optimiser alone": networks_alone,
        "matrix products alone": linear_layers,
        "bare loop, sparse first layer": functools.partial(bare, sparse_input=True),
    }


def main() -> None:
    """Run all contestants in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--genes", type=int, nargs="+", default=[2000, 7000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--scgen", metavar="PYTHON", help="interpreter of scGen's environment")
    parser.add_argument("--only-scgen", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_scgen:
        n_genes, batch_size = args.only_scgen
        print(json.dumps(scgen_model(make_cells(N_CELLS, n_genes), batch_size)))
        return
    if args.profile:
        of_sizes = {n_genes: profile(make_cells(N_CELLS, n_genes)) for n_genes in args.genes}
        table = pd.concat([of.head(20).assign(genes=n) for n, of in of_sizes.items()])
        write(table, "throughput_profile")
        print(table.round(3).to_string(index=False))
        return
    rows = []
    for n_genes in args.genes:
        adata = make_cells(N_CELLS, n_genes)
        for number in range(args.rounds):
            for name, run in (variants() if args.variants else contestants(args.scgen)).items():
                rate = run(adata)
                rows.append(
                    {"genes": n_genes, "round": number, "method": name, "cells_per_second": rate}
                )
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    limit = table[table["method"] == "bare loop"].set_index(["genes", "round"])["cells_per_second"]
    of_round = pd.MultiIndex.from_frame(table[["genes", "round"]])
    table["ratio"] = table["cells_per_second"] / limit[of_round].to_numpy()
    write(table, "throughput_variants" if args.variants else "throughput")
    median = table.groupby(["genes", "method"], sort=False)[["cells_per_second", "ratio"]]
    print(median.median().round(3).to_string())


if __name__ == "__main__":
    main()
