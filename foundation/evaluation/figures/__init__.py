"""Figures that a run keeps, drawn without a display."""

from foundation.evaluation.figures.bars import bars_per_roi
from foundation.evaluation.figures.learning_curve import learning_curve
from foundation.evaluation.figures.maps import maps
