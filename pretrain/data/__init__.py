"""Preprocessed cases to crops: the case set, partial reads, and a loader that is a pure function of the seed."""

from nnssl.pretrain.data.case import CaseFormat, CaseInfo, CaseReader, OpenCase
from nnssl.pretrain.data.case_set import BadCase, CaseRef, CaseSet
from nnssl.pretrain.data.crops import CropDataset, Sample, collate
from nnssl.pretrain.data.intensity import intensity_range
from nnssl.pretrain.data.loader import CropLoader, make_loader
from nnssl.pretrain.data.orientation import Geometry
from nnssl.pretrain.data.sampling import HELD_OUT, TRAIN, SampleStream

Pool = CaseSet  # its name before

__all__ = [
    "HELD_OUT",
    "TRAIN",
    "BadCase",
    "CaseFormat",
    "CaseInfo",
    "CaseReader",
    "CaseRef",
    "CropDataset",
    "CropLoader",
    "Geometry",
    "OpenCase",
    "CaseSet",
    "Pool",
    "Sample",
    "SampleStream",
    "collate",
    "intensity_range",
    "make_loader",
]
