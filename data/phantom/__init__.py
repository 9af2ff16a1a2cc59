"""Simulated subjects with known truth, for tests, benchmarks and the quickstart."""

from data.phantom.simulate import PRESETS, PhantomConfig, write_phantom
from data.phantom.truth import SubjectTruth, Truth, read_truth, truth_path

__all__ = ["PRESETS", "PhantomConfig", "SubjectTruth", "Truth", "read_truth", "truth_path", "write_phantom"]
