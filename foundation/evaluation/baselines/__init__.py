"""The systems that a learned model has to beat, by name, on the same tokens and the same training images."""

from foundation.evaluation.baselines.kept import kept_prediction
from foundation.evaluation.baselines.ridge import DEFAULT_ALPHAS, LinearModel, fit_ridge
from foundation.evaluation.baselines.systems import BASELINES, predict, predict_out_of_fold
