"""mamba-ssm's own Triton kernels on a CPU, for parity tests: Triton interprets them, program after program.

They run in a process of their own, since `TRITON_INTERPRET` counts only while Triton is imported, and since what stands
in for a GPU there must be seen by nobody else.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

NEEDED = ("mamba_ssm", "triton", "einops")
ROOT = Path(__file__).parents[3]


def missing() -> list[str]:
    """Return the packages that this needs and that aren't installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def run_kernels(cases: list[tuple[dict[str, torch.Tensor], int]], directory: Path) -> list[dict[str, torch.Tensor]]:
    """Return what `differentiated` gives for the kernels, of each case (arguments in single precision, chunk size)."""
    torch.save(cases, directory / "cases.pt")
    command = [sys.executable, "-m", "tests.foundation.model.triton_shim", str(directory)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})
    return torch.load(directory / "results.pt")


def stand_in_for_a_gpu() -> None:
    """Replace what the kernels' launchers ask of CUDA."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **options: Any) -> Any:  # no timing: the first configuration is as good as any
        self.best_config = chosen = self.configs[0]
        if chosen.pre_hook:
            chosen.pre_hook(dict(zip(self.arg_names, args, strict=False)) | options | chosen.all_kwargs())
        return self.fn.run(*args, **options, **chosen.all_kwargs())

    Autotuner.run = run
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # Mamba-1's kernel, compiled
    torch.cuda.device = lambda index: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *args: SimpleNamespace(multi_processor_count=1)  # type: ignore[assignment]


def main(directory: Path) -> None:
    """Run the cases of a directory and leave the results in it."""
    torch.set_num_threads(1)
    stand_in_for_a_gpu()
    from foundation.model.scan import mamba_ssm_scan
    from tests.foundation.model.scan_cases import differentiated

    cases = torch.load(directory / "cases.pt")
    results = [differentiated(mamba_ssm_scan, given, chunk_size=chunk_size) for given, chunk_size in cases]
    torch.save(results, directory / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
