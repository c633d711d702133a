"""The names of scvi-tools that this package relies on; all are public."""

import importlib

import pytest

NAMES = [
    "scvi.REGISTRY_KEYS",
    "scvi.settings",
    "scvi.data.AnnDataManager",
    "scvi.data.fields.CategoricalObsField",
    "scvi.data.fields.LayerField",
    "scvi.data.fields.NumericalObsField",
    "scvi.dataloaders.DataSplitter",
    "scvi.model.base.BaseModelClass",
    "scvi.model.base.UnsupervisedTrainingMixin",
    "scvi.model.base.VAEMixin",
    "scvi.module.base.BaseModuleClass",
    "scvi.module.base.LossOutput",
    "scvi.module.base.auto_move_data",
    "scvi.nn.FCLayers",
    "scvi.train.SaveCheckpoint",
    "scvi.train.TrainRunner",
    "scvi.train.TrainingPlan",
    "scvi.train.merge_kwargs",
    "scvi.utils.setup_anndata_dsp",
    "scvi.utils.track",
]


@pytest.mark.parametrize("name", NAMES)
def test_importable(name):
    module, attribute = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), attribute)
