"""Training of sidekicks: capture q, k, v; train each layer's maps; see docs/training.md."""

from less.fit.calibrate import calibrate
from less.fit.capture import Captured, LayerWalk
from less.fit.eviction import Eviction
from less.fit.one_layer import fit_layer
from less.fit.recipe import LayerRecord, Progress, Recipe
from less.fit.schedule import schedule
from less.fit.text import read_stream, sample_chunks
from less.fit.train import train
from less.fit.tune import Tuning, tune

__all__ = [
    "Captured",
    "Eviction",
    "LayerRecord",
    "LayerWalk",
    "Progress",
    "Recipe",
    "Tuning",
    "calibrate",
    "fit_layer",
    "read_stream",
    "sample_chunks",
    "schedule",
    "train",
    "tune",
]
